"""The commands of the laboratory against a running service, and the client's calls."""

import asyncio
import json
import sys
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from conftest import TINY, gain_of, peft_config, peft_tensors, upload_parts

from bonsai_lora import AsyncClient, Client
from bonsai_lora.api.routes import lab as lab_routes
from bonsai_lora.cli import pictures, progress
from bonsai_lora.cli.main import main
from bonsai_lora.errors import (
    InvalidRequestError,
    JobInterruptedError,
    SetExistsError,
    SetNotFoundError,
)


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
        (("a/b", "one"), "'a/b' cannot name a set; expected a letter or digit"),
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
    by_module = run("compare", "one", "two", "--modules")[1]
    assert "\nq_proj\n" in by_module
    assert by_module.endswith("subspace similarity: 1\n")
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


def test_exact_survival(run, service):
    with Client(service) as client:
        client.upload_set("plain", TINY / "plain")
        estimate = client.get_survival("tiny-qwen3", "plain", dtype="BF16")
    code, out, _ = run("survival", "tiny-qwen3", "plain", "--exact", "--json")
    assert code == 0
    exact = json.loads(out)
    assert exact["exact"] is True
    assert exact["gain"] == pytest.approx(estimate["gain"], rel=1e-5)


def test_extract(run, service, tmp_path):
    with Client(service) as client:
        client.upload_set("plain", TINY / "plain")
        folder = tmp_path / "bases" / "merged"
        assert client.pull("tiny-qwen3/plain", folder)["delta_gain"] in (
            None,
            pytest.approx(1, abs=0.1),
        )
    code, out, err = run("extract", "new", "tiny-qwen3", "merged", "--rank", "8")
    assert (code, err) == (0, "")
    first, head, *rows = out.splitlines()
    assert first.startswith("new: rank 8, energy kept 9")
    assert first.endswith("14 tensors changed, 11 the same")
    assert head.split()[:3] == ["NAME", "KIND", "RANK"]
    assert {tuple(row.split()[1:3]) for row in rows} == {("lora", "8")}
    code, _, err = run("extract", "same", "tiny-qwen3", "tiny-qwen3", "--rank", "8")
    assert (code, err.split()[-1]) == (1, "[invalid_request]")
    assert run("extract", "new", "tiny-qwen3", "merged", "--energy", "0.9")[2].endswith(
        "[set_exists]\n"
    )
    found = json.loads(run("compare", "plain", "new", "--json")[1])
    assert found["cosine"][0][1] == pytest.approx(1, abs=0.01)


def cells(path):
    """The labels of a picture's shapes; it must be well-formed."""
    tree = ET.fromstring(path.read_text("utf-8"))
    return [one.text for one in tree.iter("{http://www.w3.org/2000/svg}title")]


def test_pictures(run, service, tmp_path):
    with Client(service) as client:
        for name in ("plain", "attention-only"):
            client.upload_set(name, TINY / name)
        cosines = {
            one["name"]: one["cosine"][0][1]
            for one in client.compare(["plain", "attention-only"])["modules"]
        }
    path = tmp_path / "plot.svg"
    assert run("compare", "plain", "attention-only", "--plot", path)[0] == 0
    assert len(cells(path)) == len(cosines) == 14
    assert f"1 q_proj: {cosines['model.layers.1.self_attn.q_proj']:.4g}" in cells(path)
    assert run("compare", "plain", "plain", "attention-only", "--plot", path)[0] == 0
    assert "interference of plain" in path.read_text()
    assert run("spectrum", "plain", "--plot", path, "--json")[0] == 0
    assert len(cells(path)) == 14
    assert cells(path)[0] == "model.layers.0.mlp.down_proj"
    code, _, err = run("spectrum", "plain", "--plot", tmp_path / "absent" / "plot.svg")
    assert code == 2
    assert "absent" in err
    with pytest.raises(SystemExit):
        main(["compare", "plain", "--url", service, "--plot", str(tmp_path / "plot.png")])
    assert not (tmp_path / "plot.png").exists()


def test_pictures_of_odd_values(tmp_path):
    path = tmp_path / "plot.svg"
    spectra = {"a<b": [1.0, 1e-30, 0.0], "zero": [0.0], "empty": []}
    path.write_text(pictures.curves("a & b", spectra))
    assert cells(path) == ["a<b", "zero", "empty"]
    path.write_text(pictures.heat_map("none", {}, 0, 1))
    assert cells(path) == []
    assert pictures._color(-1) == pictures._color(0) != pictures._color(1) == pictures._color(2)


def test_jobs_of_the_client(run, service):
    shares = []
    with Client(service) as client:
        job = client.start_combine("later", {"one": 1.0}, dry_run=True)
        report = client.wait_for(job, shares.append)
        assert report["rank"] == 2
        assert shares[-1] == 1.0
        assert client.get_job(job["id"])["state"] == "done"
        assert client.wait_for(job["id"]) == report
        assert client.cancel_job(job["id"])["state"] == "done"
        failing = client.start_extract("new", "tiny-qwen3", "tiny-qwen3", energy=0.9)
        with pytest.raises(InvalidRequestError, match="have the same") as refused:
            client.wait_for(failing)
        assert refused.value.values["field"] == "tuned"
        with pytest.raises(JobInterruptedError, match="was cancelled"):
            client.wait_for({**job, "state": "cancelled"})

    async def wait():
        async with AsyncClient(service) as client:
            job = await client.start_combine("made", {"two": 2.0})
            return await client.wait_for(job["id"])

    assert asyncio.run(wait())["name"] == "made"


def test_a_little_gain_is_a_line_of_pull(based, rng, tmp_path, capsys):
    module = "model.layers.0.self_attn.q_proj"
    tensors = peft_tensors(rng, module, d_in=64, d_out=128)
    small = {name: one * np.float32(0.001) for name, one in tensors.items()}
    assert upload_parts(based, "small", peft_config(), small).status_code == 201
    gain = gain_of(based, "/v1/bases/tiny-qwen3/merged/small/model-00001-of-00003.safetensors")
    assert 0 < gain < 0.5
    command = ["pull", "--url", str(based.base_url), "tiny-qwen3/small", "-o", str(tmp_path / "m")]
    assert main(command) == 0
    assert capsys.readouterr().err == (
        f"warning: rounding left {gain:.0%} of the deltas; apply the set beside the base instead, "
        "or merge it into a wider base\n"
    )


@pytest.mark.parametrize(
    "words", [("compare", "one", "two"), ("spectrum", "one")], ids=["compare", "spectrum"]
)
def test_what_takes_long_is_a_job_with_a_line(run, service, monkeypatch, words):
    short = run(*words)
    monkeypatch.setattr(lab_routes, "LONG_NANOSECONDS", 0.0)
    monkeypatch.setattr(progress, "_SHOWN_AFTER_SECONDS", 0.0)
    assert run(*words) == short  # silent, as standard error is no terminal
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    code, out, err = run(*words)
    assert (code, out) == short[:2]
    assert err.endswith("] 100%, 0 s left \n")
    code, out, err = run(*words, "--json")
    assert (code, err) == (0, "")
    with Client(service) as client:
        made = client.compare(words[1:]) if len(words) > 2 else client.get_spectrum(words[1])
        assert json.loads(out) == made
        kinds = [one["kind"] for one in client.list_jobs()["jobs"]]
    assert kinds == [words[0]] * 3


def test_a_job_line_is_shown_after_a_second(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with progress.JobLine() as line:
        line.update(0.1)
        assert capsys.readouterr().err == ""
        monkeypatch.setattr(progress, "_SHOWN_AFTER_SECONDS", 0.0)
        line.update(0.5)
    assert capsys.readouterr().err.startswith("\r[###############               ]  50%, ")


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
