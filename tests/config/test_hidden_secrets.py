"""Messages about a wrong command line or config: none of them shows a secret."""

from __future__ import annotations

from pathlib import Path

import pytest

import trainkit
from tests.helpers import thinned
from trainkit.cli.main import main
from trainkit.core.redaction import REDACTED

SECRET, SHORT = "S3cret-Zq9", "q7z"
HOOK = "+hooks.h={_target_: hiddenmodule.Hook, "
MODULE = """
class Hook:
    def __init__(self, name="", api_key: int = 0):
        raise ValueError(f"cannot log in with {api_key} {name}")

    def on_step(self, state): ...

class Strict:
    def __init__(self, password: int, size: int = 1): ...
    def on_step(self, state): ...
"""

# Wrong command lines; S is the secret.
WRONG = [
    ["+model.api_key=S,b"],
    ["+model.api_key=b,S"],
    ["+model.api_key='S',b"],
    ["+model.api_key=choice(S,b)"],
    ["+model.api_key=[S,b],c"],
    ["model.api_key=S"],
    ["data.password=S"],
    ["data.password=S"],
    ["data.password='it is S'"],
    ["data.token=[S,a]"],
    ["data.token={a: S}"],
    ["++data.password=S"],
    ["+data.password=S"],
    ["+optim.api_key=S"],
    ["+optim.api_key={a: {b: S}}"],
    ["+lr.password=S"],
    ["api_key=S"],
    ["+api_key=S"],
    ["~model.api_key=S"],
    ["model.api_key='S"],
    ["model.api_key=[S"],
    ["model.api_key={a: S"],
    ["model.api_key=S)"],
    ["model.api_key=a=S"],
    ["model.api_key=$S"],
    ["+model.api_key=S b,c:d"],
    ["model.api_key"],
    ["model@api_key=S"],
    ["+model@password=S"],
    ["lr={password: S}"],
    ["epochs={api_key: S, n: 2}"],
    ["data.split='https://user:S@host/path'"],
    ["lr='https://host?api_key=S'"],
    ["monitor.metric='https://S@host'"],
    ["optim='https://user:S@host'"],
    ["experiment='https://user:S@host'"],
    ["-m", "+data.password=S,b"],
    ["-m", "epochs=0,1", "+optim.api_key=S"],
    ["-m", "+data.password=interval(1,S)"],
    ["-m", "+data.password=range(1,S)"],
    ["--api_key=S"],
    ["--api-key", "S"],
    ["--model.api_key=S"],
    ["--password=S", "lr=1"],
    ["--config-dir", "https://user:S@host"],
    ["--cfg", "job", "data.password=S"],
    ["--cfg", "job", "--package", "x", "+hooks.h.password=S"],
    [f"{HOOK}api_key: S}}"],
    [f"{HOOK}password: S, name: n}}"],
    ["+hooks.h={_target_: hiddenmodule.Strict, password: S}"],
    ["+hooks.h={_target_: hiddenmodule.Strict, password: [S]}", "epochs=0"],
    ["+hooks.h={_target_: hiddenmodule.Strict, api_key: S, password: 1}"],
    ["+hooks.h={_target_: hiddenmodule.No, api_key: S}"],
    ["+hooks.h={api_key: S}"],
    ["+hooks.h={_target_: hiddenmodule.Strict, size: '${oc.env:PLACE_S}'}"],
    ["lr=${oc.env:HF_TOKEN_S}"],
    ["epochs='${oc.env: PLACE_S}'"],
    ["params", "model.api_key=S,b"],
    ["inspect", "--json", "data.password=S"],
    ["bench", "+optim.api_key=S"],
    ["find-lr", "data.token=S"],
    ["verify-resume", "data.token=S"],
]


@pytest.fixture(autouse=True)
def _environment(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "hiddenmodule.py").write_text(MODULE)
    monkeypatch.setenv("COLUMNS", "200")


def assert_hidden(folder: Path, secret: str, capfd: pytest.CaptureFixture[str], *argv: str) -> None:
    """Run a command that fails; assert that its output and the files of the folder do not contain a secret."""
    assert main(argv) in (1, 2, 3, 5), argv
    done = capfd.readouterr()
    assert "error: " in done.err, argv
    assert "TRAINKIT_TRACEBACK" not in done.err or "hooks.h: ValueError" in done.err, done.err
    for text in (done.out, done.err):
        assert secret not in text, text
    for file in folder.rglob("*"):
        assert file.is_dir() or secret.encode() not in file.read_bytes(), file


@pytest.mark.parametrize("words", thinned(WRONG, keep=5))
def test_a_message_about_a_wrong_command_line_hides_the_secret(
    words: list[str], here: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for secret in (SECRET, SHORT):
        monkeypatch.setenv("PLACE_S", secret)
        monkeypatch.setenv("HF_TOKEN_S", SECRET)
        written = [word if "_S}" in word else word.replace("S", secret) for word in words]
        written = [word.replace(f"{secret}trict", "Strict") for word in written]
        assert_hidden(here, secret, capfd, *written)


RESUMED = ["data.password=S", "+model.api_key=S,b", "model.api_key='S", "model=S.api_key=S", "hydra.password=S"]
RESUMED += ["lr={password: S}", "resume.password=S", "resume.allow=[api_key=S]", "lr='https://user:S@host'"]


def test_a_message_about_a_wrong_resume_hides_the_secret(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    quick = ["model=mlp", "model.hidden=[4]", "epochs=1", "limit_batches=2", "progress=off"]
    trainkit.train(trainkit.compose(quick), directory=here / "run")
    for override in RESUMED:
        for secret in (SECRET, SHORT):
            assert_hidden(here, secret, capfd, "resume", "run", override.replace("S", secret))


def test_a_message_about_a_config_file_hides_the_secret(
    here: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLACE_S", "other-S3cret-Zq9")
    (here / "conf/experiment").mkdir(parents=True)
    file = here / "conf/experiment/mine.yaml"
    head = "# @package _global_\nhooks:\n  h:\n    _target_: hiddenmodule.Strict\n    password: "
    secret = "deep-S3cret-Zq8"
    for value in (secret, "${oc.env:PLACE_S}", f"[{secret}]", f"{{a: {secret}}}"):
        for more in (
            "",
            "lr: ${hooks.h.password}\n",
            "data: ${hooks.h.password}\n",
            "seed: '${hooks.h.password}'\n",
        ):
            file.write_text(f"{head}{value}\n{more}")
            assert main(["experiment=mine", "epochs=0"]) == 2
            done = capfd.readouterr()
            assert "S3cret" not in done.out + done.err, done.err


def test_ordinary_words_of_a_message_stay(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["data.token=a", "epochs=0", "+model.num_tokens=512,256"]) == 2
    text = capfd.readouterr().err
    assert f"data.token={REDACTED}: the key 'data.token' does not exist" in text
    assert "+model.num_tokens=512,256: several values" in text
    assert main(["+model.api_key=S3cret,b"]) == 2
    assert f"+model.api_key={REDACTED}: several values" in capfd.readouterr().err
