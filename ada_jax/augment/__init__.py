"""Augmentation of training images: crops, AugMix, and the distorted networks of DeepAugment."""
