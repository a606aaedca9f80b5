"""Pictures of classes and runs with any names."""

import os
import pathlib

import matplotlib
import numpy as np
import pytest

from ada_jax.report import figures

NAMES = ("$5_to_$10", r"a\$b$c", r"\frac", "$$", os.fsdecode(b"caf\xe9"), "a\nb", "^%&#{}", "")


def draw(path: pathlib.Path, name: str) -> bytes:
    zeros = np.zeros((1, 4, 4, 3))
    classes = ("label", "clean_prediction", "augmented_prediction")
    predictions = dict.fromkeys(classes, np.zeros(1, int))
    figures.adversarial_rows(
        str(path),
        clean=zeros,
        augmented=zeros,
        similarity=np.zeros(1),
        class_names=[name],
        **predictions,
    )
    return path.read_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_any_class_name_is_drawn_letter_by_letter(name, tmp_path, monkeypatch):
    drawn = draw(tmp_path / "a.png", name)
    monkeypatch.setattr(figures, "_plain", lambda name: name)
    with matplotlib.rc_context({"text.parse_math": False}):
        assert drawn == draw(tmp_path / "b.png", name.replace("\udce9", r"\udce9"))


@pytest.mark.parametrize("name", ["_run", "$a$"])
def test_any_run_has_its_place_in_the_legend(name, tmp_path, monkeypatch):
    labels = []
    monkeypatch.setattr(
        figures, "_save", lambda figure, _: labels.extend(figure.legends[0].get_texts())
    )
    figures.severity_curves("", {name: {"fog": [1.0] * 5}}, order=("fog",))
    assert [t.get_text().strip("\u200b").replace(r"\$", "$") for t in labels] == [name]
