"""`bonsai-lora keys`: the file that it writes, and a service that reads it while it runs."""

import json
import re
import stat
import subprocess
import time

import httpx
import pytest
from test_command import COMMAND, running

from bonsai_lora.api import keys_file
from bonsai_lora.api.keys_file import KeysFileError, WatchedKeys, read_keys
from bonsai_lora.cli.main import main


@pytest.fixture
def path(tmp_path):
    return tmp_path / "keys.json"


def keys(path, action, *words):
    return main(["keys", action, "--keys-file", str(path), *words])


def new_key(capsys, path, *words):
    assert keys(path, "new", *words) == 0
    return capsys.readouterr().out.strip()


def test_a_new_key_is_printed_once_and_kept_as_a_digest(capsys, path):
    token = new_key(
        capsys,
        path,
        *("--scope", "read", "--scope", "apply", "--prefix", "acme.", "--name", "ci"),
        *("--expires", "90d", "--rows-per-second", "200", "--sets", "3", "--bytes", "1000"),
    )
    assert re.fullmatch(r"bl_[a-z0-9]{8}_[A-Za-z0-9_-]{43}", token)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert token not in path.read_text()
    key = read_keys(path).ring().find(token.encode())
    assert (key.scopes, key.prefixes, key.name) == ({"read", "apply"}, ("acme.",), "ci")
    assert key.quota.sets == 3
    assert key.quota.bytes == 1000
    assert key.rates.rows_per_second == 200
    assert abs(key.expires_at - time.time() - 90 * 86400) < 60
    assert [one.name for one in path.parent.iterdir()] == ["keys.json"]


def test_a_date_in_the_past_is_refused(capsys, path):
    with pytest.raises(SystemExit):
        keys(path, "new", "--scope", "read", "--expires", "2020-01-01")
    assert "'2020-01-01' is in the past; name a later time" in capsys.readouterr().err
    assert not path.exists()


def test_a_folder_that_does_not_exist_is_named(capsys, path):
    assert keys(path.parent / "absent" / "keys.json", "new", "--scope", "read") == 2
    absent = path.parent / "absent"
    assert capsys.readouterr().err == f"bonsai-lora: {absent}: No such file or directory\n"


def test_keys_are_listed_and_removed(capsys, path):
    first = new_key(capsys, path, "--scope", "admin")
    new_key(capsys, path, "--scope", "read", "--prefix", "b-", "--expires", "0h")
    number = first.split("_")[1]
    assert keys(path, "ls") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == [number, "admin", "*", "never"]
    assert lines[2].endswith(" (expired)")
    assert keys(path, "rm", number) == 0
    assert number not in path.read_text()
    assert keys(path, "rm", number) == 2
    assert f"has no key '{number}'" in capsys.readouterr().err


def test_a_bad_prefix_is_refused_and_changes_nothing(capsys, path):
    assert keys(path, "new", "--scope", "read", "--prefix", "acme") == 2
    assert "must end in '.', '-' or '_'" in capsys.readouterr().err
    assert not path.exists()


def test_a_wrong_limit_is_named(capsys, path):
    assert keys(path, "new", "--scope", "read", "--requests-per-second", "-1") == 2
    error = capsys.readouterr().err
    assert error == "bonsai-lora: --requests-per-second is -1.0; expected more than 0\n"
    assert not path.exists()


ENTRY = {"id": "a" * 8, "sha256": "0" * 64, "scopes": ["read"], "prefixes": [""]}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "JSON"),
        ("[]", "the file"),
        ('{"keys": [], "more": 1}', "more"),
        (json.dumps({"keys": [ENTRY, ENTRY]}), "given twice"),
        (json.dumps({"keys": [{**ENTRY, "scopes": ["root"]}]}), r"keys\[0\]\.scopes\[0\]: "),
        (json.dumps({"keys": [{**ENTRY, "scopes": []}]}), r"keys\[0\]\.scopes: "),
        (json.dumps({"keys": [{**ENTRY, "sha256": "00"}]}), r"keys\[0\]\.sha256: expected text"),
        (json.dumps({"keys": [{**ENTRY, "prefixes": ["a"]}]}), "must end in"),
        (json.dumps({"keys": [{**ENTRY, "expires_at": "2027-01-01"}]}), "expires_at"),
        (json.dumps({"keys": [{**ENTRY, "limits": {"rows_per_second": 0}}]}), "rows_per_second"),
        (json.dumps({"keys": [{**ENTRY, "quota": {"sets": -1}}]}), "quota.sets"),
    ],
)
def test_a_bad_file_is_refused_with_its_reason(path, text, reason):
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(KeysFileError, match=reason):
        read_keys(path)


def test_others_may_not_write_the_file_and_should_not_read_it(path):
    path.write_text('{"keys": []}')
    path.chmod(0o620)
    with pytest.raises(KeysFileError, match="mode 0620"):
        read_keys(path)
    path.chmod(0o640)  # as Kubernetes mounts a secret for a group; a warning
    assert read_keys(path).keys == []


def test_a_changed_file_is_read_again_and_a_bad_one_leaves_the_keys(capsys, path, monkeypatch):
    token = new_key(capsys, path, "--scope", "read").encode()
    errors = []
    watched = WatchedKeys(path, lambda: errors.append(1))
    now = [keys_file.monotonic()]
    monkeypatch.setattr(keys_file, "monotonic", lambda: now[0])
    good = path.read_bytes()
    path.write_text("{")
    assert not watched.is_changed()  # within the second
    now[0] += 1.1
    assert not watched.is_changed()
    assert watched.ring.find(token)
    assert len(errors) == 1
    now[0] += 1.1
    assert not watched.is_changed()
    assert len(errors) == 1  # reported once
    path.unlink()
    now[0] += 1.1
    assert not watched.is_changed()
    assert watched.ring.find(token)
    path.write_bytes(good)
    path.chmod(0o600)
    now[0] += 1.1
    assert watched.is_changed()
    assert keys(path, "rm", token.decode().split("_")[1]) == 0
    now[0] += 1.1
    assert watched.is_changed()
    assert watched.ring.find(token) is None


def test_a_running_service_takes_new_keys_and_drops_removed_ones(capsys, path, tmp_path):
    token = new_key(capsys, path, "--scope", "read")
    flags = ["--store", str(tmp_path / "store"), "--keys-file", str(path), "--workers", "2"]
    with running(*flags) as (address, _), httpx.Client(base_url=address, timeout=60) as client:

        def status(key):
            headers = {"Authorization": f"Bearer {key}"}
            return client.get("/v1/sets", headers=headers).status_code

        assert client.get("/v1/sets").status_code == 401
        assert status(token) == 200
        other = new_key(capsys, path, "--scope", "read")
        assert keys(path, "rm", token.split("_")[1]) == 0
        deadline = time.monotonic() + 10
        while (status(other), status(token)) != (200, 401):
            assert time.monotonic() < deadline
            time.sleep(0.1)


@pytest.mark.parametrize("lane", ["auto", "off"])
def test_the_log_has_the_id_of_the_key_and_not_the_key(capsys, path, tmp_path, lane):
    token = new_key(capsys, path, "--scope", "read", "--scope", "apply")
    log = tmp_path / "log"
    flags = ["--store", str(tmp_path / "store"), "--keys-file", str(path), "--port", "0"]
    flags += [
        "--log-format",
        "json",
        "--log-level",
        "debug",
        "--fast-lane",
        lane,
        "--kernels",
        "off",
    ]
    with log.open("wb") as out:
        process = subprocess.Popen([COMMAND, "serve", *flags], stderr=out)
        try:
            while not (found := re.search(r"serving on (http://\S+),", log.read_text())):
                assert process.poll() is None
                time.sleep(0.05)
            headers = {"Authorization": f"Bearer {token}"}
            with httpx.Client(base_url=found[1], headers=headers, timeout=60) as client:
                client.get("/v1/sets")
                client.post("/v1/sets/s/adapters/m/apply", json={"inputs": [[1]]})
                client.get("/v1/sets", headers={"Authorization": "Bearer x"})
        finally:
            process.terminate()
            assert process.wait(30) == 0
    lines = [json.loads(one) for one in log.read_text().splitlines()]
    number = token.split("_")[1]
    requests = [one for one in lines if "request_id" in one and "ms" in one]
    assert [one.get("key") for one in requests] == [number, number, None]
    assert token not in log.read_text()
    assert token[12:] not in log.read_text()


@pytest.mark.parametrize("workers", ["1", "2"])
def test_serve_does_not_start_with_a_bad_file(capfd, path, tmp_path, workers):
    flags = ["--store", str(tmp_path / "store"), "--keys-file", str(path), "--workers", workers]
    assert main(["serve", "--port", "0", *flags]) == 2
    assert "cannot be read" in capfd.readouterr().err


def test_serve_refuses_the_world_without_keys(capfd, tmp_path, monkeypatch):
    monkeypatch.delenv("BONSAI_LORA_NO_AUTH")
    flags = ["serve", "--port", "0", "--store", str(tmp_path / "store")]
    assert main([*flags, "--host", "0.0.0.0"]) == 2
    assert "--no-auth" in capfd.readouterr().err
    with running("--store", str(tmp_path / "store")) as (address, _):  # loopback
        assert httpx.get(f"{address}/v1/sets").status_code == 200


def test_no_application_without_keys_or_leave(monkeypatch, tmp_path):
    from bonsai_lora.api.app import create_app
    from bonsai_lora.settings import Settings

    monkeypatch.delenv("BONSAI_LORA_NO_AUTH")
    with pytest.raises(ValueError, match="--keys-file"):
        create_app(Settings(store=str(tmp_path / "store")))
    assert not (tmp_path / "store").exists()
