"""The command that verifies a store."""

import re
import shutil

import pytest
from conftest import DATA
from test_digest import flip_last_bit, path_of, store  # noqa: F401 - the fixture
from test_records import NOW

from bonsai_lora.cli.main import main
from bonsai_lora.core.config import LoraConfig
from bonsai_lora.core.loraset import BonsaiLoraSet
from bonsai_lora.storage.newset import NextVersion


@pytest.fixture
def several(store):  # noqa: F811 - the fixture
    """The store of `s`, with `t` and one of the first release."""
    made = BonsaiLoraSet.new(LoraConfig(rank=2), "base", "t").add_mlp_adapters(8, 16)
    with store.lock("t"):
        store.write(NextVersion(lora_set=made, origin="initialized", now=NOW, previous=None))
    shutil.copy(DATA / "set-files-0.1.0" / "made.safetensors", store.root / "sets")
    return store


def verify(capsys, *arguments):
    """Run the command; return its code and the result by name."""
    code = main(["verify", *arguments])
    lines = capsys.readouterr().out.splitlines()
    return code, dict(re.fullmatch(r"(\S+) +[\d,]+ B  (.*)", line).groups() for line in lines)


def test_a_sound_store(several, capsys):
    code, results = verify(capsys, "--store", str(several.root))
    assert code == 0
    assert results == {"made": "ok, but written without a digest", "s": "ok", "t": "ok"}
    assert verify(capsys, "--store", str(several.root), "t") == (0, {"t": "ok"})


def test_a_damaged_set_is_named_and_moved(several, capsys):
    flip_last_bit(path_of(several))
    code, results = verify(capsys, "--store", str(several.root))
    assert code == 1
    assert results["s"].startswith("bad: s.safetensors is damaged")
    assert results["t"] == "ok"
    assert not path_of(several).exists()
    code, results = verify(capsys, "--store", str(several.root), "s", "t")
    assert (code, results["t"]) == (1, "ok")
    assert verify(capsys, "--store", str(several.root))[0] == 0


def test_the_store_is_that_of_the_settings(several, capsys, monkeypatch):
    monkeypatch.setenv("BONSAI_LORA_STORE", str(several.root))
    assert verify(capsys)[0] == 0


def test_what_is_missing(several, capsys, tmp_path):
    assert verify(capsys, "--store", str(several.root), "none") == (1, {"none": "missing"})
    assert main(["verify", "--store", str(tmp_path / "no")]) == 2
    assert "there is no store at" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_a_wrong_setting_is_one_line(capsys, monkeypatch):
    monkeypatch.setenv("BONSAI_LORA_PORT", "many")
    with pytest.raises(SystemExit) as ended:
        main(["verify"])
    assert ended.value.code == 2
    text = capsys.readouterr().err
    assert text == "bonsai-lora: --port (BONSAI_LORA_PORT) is 'many'; expected an integer\n"


@pytest.mark.parametrize(
    ("flag", "value", "text"),
    [
        ("--port", "70000", "is '70000'; expected 65535 or less"),
        ("--workers", "0", "is '0'; expected 1 or more"),
        ("--stall-seconds", "0", "is '0'; expected more than 0"),
        ("--stall-seconds", "long", "is 'long'; expected a number"),
        ("--kernels", "fast", "is 'fast'; expected 'auto' or 'off'"),
        ("--no-auth", "perhaps", "is 'perhaps'; expected true or false"),
        ("--store", "", "is ''; expected a length of 1 or more"),
        ("--root-path", "lora", "is 'lora'; expected the beginning of a path, such as /lora"),
        ("--trusted-proxies", "10.0.0.0/40", "'10.0.0.0/40' is neither an address nor a network"),
        ("--tls-cert", "cert.pem", "is missing; a certificate and its key belong together"),
    ],
)
def test_a_wrong_flag_says_what_is_wrong_with_its_value(capsys, flag, value, text):
    assert main(["serve", flag, value]) == 2
    error = capsys.readouterr().err
    assert text in error
    assert "should" not in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("command", ["serve", "verify", "gc"])
def test_an_address_that_is_no_bucket_is_not_a_folder(command, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    try:
        code = main([command, "--store", "s3a://bucket/prefix"])
    except SystemExit as ended:
        code = ended.code
    assert code == 2
    assert "is 's3a://bucket/prefix'; expected a folder, or a bucket" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
