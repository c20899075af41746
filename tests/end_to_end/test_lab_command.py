"""The commands of the laboratory against a running service, and the client's calls."""

import asyncio
import json

import numpy as np
import pytest
from conftest import TINY

from bonsai_lora import AsyncClient, Client
from bonsai_lora.cli.main import main
from bonsai_lora.errors import SetExistsError, SetNotFoundError


@pytest.fixture
def run(service, capsys):
    """Run a command against a service with the sets `one` (twice `two`) and `two`."""
    with Client(service) as client:
        tensors = {"q_proj": (np.eye(2, 4), np.ones((3, 2)))}
        for name, factor in (("one", 2), ("two", 1)):
            client.create_set(name, config={"rank": 2, "alpha": 2.0})
            for module, (a_matrix, b_matrix) in tensors.items():
                client.put_weights(name, module, factor * a_matrix, b_matrix)

    def run(*words):
        code = main([words[0], "--url", service, *map(str, words[1:])])
        return code, *capsys.readouterr()

    return run


def test_combine(run):
    code, out, err = run("combine", "new", "one=0.5", "two", "--method", "svd", "--energy", "0.99")
    assert (code, err) == (0, "")
    first, head, row = out.splitlines()
    assert first.startswith("new: svd, rank 1, energy kept 100.0000%, relative error ")
    assert head.split() == ["NAME", "RANK", "ENERGY_KEPT", "RELATIVE_ERROR"]
    assert row.split()[:3] == ["q_proj", "1", "1"]
    assert run("show", "new")[1].splitlines()[3] == "origin: combined"
    code, _, err = run("combine", "new", "one")
    assert code == 1
    assert err.endswith("[set_exists]\n")


def test_a_dry_run_stores_nothing(run):
    code, out, _ = run("combine", "new", "one", "two=-1", "--dry-run", "--json")
    assert code == 0
    assert json.loads(out)["rank"] == 4
    assert run("show", "new")[0] == 1


def test_warnings_go_to_standard_error(run):
    code, out, err = run("combine", "new", "one", "two", "--method", "linear")
    assert code == 0
    assert "q_proj" in out
    assert err.startswith("warning: linear adds A to A and B to B")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("new", "one=half"), "the weight 'half' is not a number; use SET=WEIGHT"),
        (("new", "one", "one=2"), "a set is named twice; add up its weights"),
        (("a/b", "one"), "'a/b' is not a valid set name"),
    ],
)
def test_wrong_arguments(run, words, message):
    code, out, err = run("combine", *words)
    assert (code, out) == (2, "")
    assert message in err


def test_compare(run):
    code, out, _ = run("compare", "one", "two")
    assert code == 0
    assert [line.split() for line in out.splitlines()] == [
        ["SET", "NORM", "one", "two"],
        ["one", "4.899", "1", "1"],
        ["two", "2.449", "1", "1"],
        ["interference:", "0"],
    ], out
    assert "\nq_proj\n" in run("compare", "one", "two", "--modules")[1]
    found = json.loads(run("compare", "one", "two", "--json")[1])
    assert found["modules"][0]["subspace_similarity"] == pytest.approx(1)


def test_spectrum(run, service):
    with Client(service) as client:
        client.upload_set("plain", TINY / "plain")
    code, out, _ = run("spectrum", "plain", "--module", "model.layers.0.mlp.up_proj")
    assert code == 0
    assert len(out.splitlines()) == 2
    assert len(json.loads(run("spectrum", "plain", "--json")[1])["modules"]) == 14
    assert run("spectrum", "absent")[2].endswith("[set_not_found]\n")


def test_survival(run, service):
    with Client(service) as client:
        client.upload_set("plain", TINY / "plain")
        found = client.get_survival("tiny-qwen3", "plain", dtype="F16")
        assert client.get_survival("tiny-qwen3", "plain") != found
    code, out, _ = run("survival", "tiny-qwen3", "plain", "--dtype", "f16")
    assert code == 0
    head, whole, *rows = (line.split() for line in out.splitlines())
    assert head == ["NAME", "UNCHANGED", "GAIN", "RELATIVE_ERROR"]
    assert whole[0] == "all"
    assert float(whole[2]) == pytest.approx(found["gain"], rel=1e-3)
    assert len(rows) == 14
    assert run("survival", "absent", "plain")[2].endswith("[base_not_found]\n")


def test_calls(run, service):
    with Client(service) as client:
        report = client.preview_combine("new", {"one": 1.0, "two": -2.0}, method="svd", rank=1)
        assert report["rank"] == 1
        assert report["relative_error"] < 1e-12
        with pytest.raises(SetNotFoundError):
            client.get_set("new")
        made = client.combine("new", {"one": 0.5, "two": 1.0})
        assert made["etag"] == client.get_set("new")["etag"]
        assert made["report"]["method"] == "exact"
        x = np.ones((1, 4), np.float32)
        np.testing.assert_allclose(client.apply("new", "q_proj", x).outputs, [[4, 4, 4]])
        with pytest.raises(SetExistsError):
            client.combine("new", {"one": 1.0})
        assert client.get_spectrum("one")["modules"][0]["energy_rank_99"] == 1


def test_async_calls(run, service):
    async def compare():
        async with AsyncClient(service) as client:
            return await client.compare(["one", "two"])

    assert asyncio.run(compare())["norms"] == pytest.approx([24**0.5, 6**0.5])
