"""`edgekit train` as a user meets it: short runs, tables, files and mistakes."""

from __future__ import annotations

import json

import pytest

from edgekit.cli.app import run_command
from edgekit.models import create_model, train_dhsa, train_digits


@pytest.fixture
def cli(capsys):
    """Runs a command line in this process; gives the exit code, stdout and stderr."""

    def run(*words):
        code = run_command([str(word) for word in words])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


SHORT = ("train", "lighthgnn", "--data", "wine", "--seeds", "2", "--epochs", "2")


def test_table(cli, tmp_path):
    code, out, err = cli(*SHORT, "--out", tmp_path)
    assert code == 0, err
    assert out.splitlines()[0].split()[:5] == ["data", "vertices", "hyperedges", "labelled", "tested"]
    for word in ("HGNN", "plain MLP", "LightHGNN", "LightHGNN+", "±", "LightHGNN - plain MLP", "2 seeds"):
        assert word in out
    assert "wine seed 1: HGNN" in err
    assert "seed" not in out.splitlines()[0]
    for name in ("wine-hgnn", "wine-lighthgnn"):
        assert f"wrote {tmp_path / name}.safetensors" in out
        assert (tmp_path / f"{name}.json").is_file()
    create_model("lighthgnn", weights=tmp_path / "wine-lighthgnn.safetensors", num_features=13, num_classes=3)
    create_model("hgnn", weights=tmp_path / "wine-hgnn.safetensors", num_features=13, num_classes=3)


def test_one_seed_claims_no_spread(cli):
    code, out, err = cli("train", "lighthgnn", "--data", "wine", "--seeds", "1", "--epochs", "2")
    assert code == 0, err
    assert "±" not in out
    assert "take more with --seeds" in out
    differences = [line for line in out.splitlines() if " - " in line]
    assert len(differences) == 5
    assert all(line.split()[-1][0] in "+-" for line in differences)  # the points come last: no p


def test_json(cli):
    options = ("--teacher", "hgnnp", "--loss", "authors", "--setting", "production", "--ties", "first", "-k", 5)
    code, out, err = cli(*SHORT, *options, "--json")
    assert code == 0, err
    told = json.loads(out)
    assert told["seeds"] == [0, 1]
    recipe = told["recipe"]
    assert [recipe[key] for key in ("teacher", "loss", "setting", "ties", "neighbours", "epochs")] == [
        "hgnnp",
        "authors",
        "production",
        "first",
        5,
        2,
    ]
    [row] = told["rows"]
    assert (row["dataset"], row["tested"]) == ("wine", 80)
    assert {method: len(values) for method, values in row["accuracies"].items()} == {
        "teacher": 2,
        "mlp": 2,
        "lighthgnn": 2,
        "lighthgnn_plus": 2,
    }


MISTAKES = {
    "data set": (("--data", "wine,iris"), "unknown vertex set 'iris'; "),
    "no data set": (("--data", ","), "name at least one data set of digits, wine, breast-cancer"),
    "teacher": (("--teacher", "hgnn+"), "unknown teacher 'hgnn+'; did you mean hgnn"),
    "loss": (("--loss", "mse"), "unknown form of the loss 'mse'; known: authors, kl"),
    "setting": (("--setting", "prod"), "unknown setting 'prod'; did you mean production"),
    "ties": (("--ties", "x"), "unknown choice among equal epochs 'x'; known: entropy, first"),
    "no seeds": (("--seeds", "0"), "seeds is a number in 1..20; got 0"),
    "many seeds": (("--seeds", "21"), "seeds is a number in 1..20; got 21"),
    "epochs": (("--epochs", "0"), "epochs must be at least 1; got 0"),
    "neighbours": (("-k", "178"), "1..177 for 178; got 178"),
}


@pytest.mark.parametrize(("options", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes(cli, options, message):
    code, out, err = cli(*SHORT, *options)
    assert (code, out) == (2, "")
    assert message in err


def test_digits(cli, tmp_path, monkeypatch):
    """The training itself is tested elsewhere; here it is what the options ask for, and where its results go."""

    def train(name, recipe, log):
        log(f"{name} with seed {recipe.seed}")
        told = {"model": name, "test_accuracy": 0.5, "seconds": recipe.epochs}
        return train_digits.Training(create_model(name), told)

    monkeypatch.setattr(train_digits, "train", train)
    code, out, err = cli("train", "digits", "--model", "shvit_digits", "--epochs", 7, "--seed", 3, "--out", tmp_path)
    assert code == 0, err
    assert "shvit_digits with seed 3" in err
    assert "50.00%" in out
    path = tmp_path / "shvit_digits.safetensors"
    assert create_model("shvit_digits", weights=path)
    assert json.loads(path.with_suffix(".json").read_text())["seconds"] == 7
    assert f"next: edgekit export shvit_digits --target onnx --weights {path}" in out
    code, out, _ = cli("train", "digits", "--out", tmp_path, "--json")
    assert [each["model"] for each in json.loads(out)] == train_digits.digits_models()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--model", "shvit_digit"), "unknown digits model 'shvit_digit'; did you mean shvit_digits"),
        (("--model", "hgnn_digits"), "unknown digits model 'hgnn_digits'"),
        (("--epochs", "0"), "epochs must be at least 1; got 0"),
    ],
    ids=["misspelt", "no image model", "epochs"],
)
def test_digits_mistakes(cli, options, message, tmp_path):
    code, _, err = cli("train", "digits", *options, "--out", tmp_path / "none")
    assert code == 2
    assert message in err
    assert not (tmp_path / "none").exists()


def test_dhsa_bytes(cli, tmp_path, monkeypatch):
    """As for the digits: the hour of training is not spent here."""

    def train(recipe, log, *, checkpoint):
        checkpoint.write_bytes(b"as far as it came")
        log(f"seed {recipe.seed}, {recipe.threads} threads")
        dense = {"needles": {"512": {"tasks": 4, "found": 0.75}}, "bits_per_byte": {"1024": 2.125}}
        return train_dhsa.Training(create_model("dhsa_bytes"), {"model": "dhsa_bytes", "dense": dense})

    monkeypatch.setattr(train_dhsa, "train", train)
    code, out, err = cli("train", "dhsa_bytes", "--seed", 3, "--threads", 2, "--out", tmp_path)
    assert code == 0, err
    assert "seed 3, 2 threads" in err
    assert "75%" in out
    assert "2.125" in out
    path = tmp_path / "dhsa_bytes.safetensors"
    assert create_model("dhsa_bytes", weights=path)
    assert json.loads(path.with_suffix(".json").read_text())["model"] == "dhsa_bytes"
    assert not (tmp_path / train_dhsa.CHECKPOINT).exists()
    assert f"next: edgekit export dhsa_bytes --target onnx --weights {path}" in out
    code, out, _ = cli("train", "dhsa_bytes", "--out", tmp_path, "--json")
    assert json.loads(out) == {
        "model": "dhsa_bytes",
        "dense": {"needles": {"512": {"tasks": 4, "found": 0.75}}, "bits_per_byte": {"1024": 2.125}},
        "weights": str(path),
    }


def test_dhsa_bytes_without_threads(cli, tmp_path):
    code, _, err = cli("train", "dhsa_bytes", "--threads", 0, "--out", tmp_path / "none")
    assert code == 2
    assert "threads must be at least 1; got 0" in err
    assert not (tmp_path / "none").exists()


def test_without_a_command(cli):
    _, out, err = cli("train", "--help")
    assert "lighthgnn" in out + err
    assert "digits" in out + err
    assert "dhsa_bytes" in out + err
