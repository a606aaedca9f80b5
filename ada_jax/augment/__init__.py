"""Augmentation of training images.

`training` applies `cropping` and `trivial_augment` before the attack, and `augmix` and `norm_noise`
after it; `mixup` acts in the classifier. `ada_jax.deepaugment` renders images before training.
"""
