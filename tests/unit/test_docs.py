"""The documents agree with the code: their examples run, their links and commands exist, nothing is left out.

``<!-- run: KIND -->`` in the line before a code block has the block run here:

``host``
    a ``sh`` block, on a scratch host without libvirt (``VIRT_SSE_ROOT``). The blocks run in order, on one
    host and in one working directory per document. The host is initialised in advance unless the document has
    ``virt-sse host init``.
``vault``
    the same, with a key vault at ``$VAULT_URL`` and its administrator's credential.
``config``
    a ``toml`` block, loaded as ``config.toml``
``vectors``
    a ``python`` block, run in the checkout, where ``tests/vectors`` is
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from support.documents import CHECKOUT, Block, Document, broken_links, documents, unknown_commands
from support.loaded_commands import write_program
from virt_sse import config
from virt_sse.agent.metrics import Metrics
from virt_sse.cli import reference
from virt_sse.config import file as config_file
from virt_sse.lab.vaults import LabVault

LANGUAGES = {"host": "sh", "vault": "sh", "config": "toml", "vectors": "python"}
DOCUMENTS = documents()
PROGRAM = Path(sys.executable).with_name("virt-sse")


def named(document: Document) -> str:
    return document.name


def marked(*kinds: str) -> list[Document]:
    return [each for each in DOCUMENTS if any(block.run in kinds for block in each.blocks)]


def single(kind: str) -> list[object]:
    return [
        pytest.param(block, id=f"{document.name}:{block.line}")
        for document in DOCUMENTS
        for block in document.blocks
        if block.run == kind
    ]


@pytest.mark.skipif(
    not (shutil.which("qemu-img") and shutil.which("cryptsetup")), reason="needs qemu-img and cryptsetup"
)
@pytest.mark.parametrize("document", marked("host", "vault"), ids=named)
def test_the_examples_of_the_documents_run(document: Document, root: Path, tmp_path: Path) -> None:
    blocks = [block for block in document.blocks if block.run in ("host", "vault")]
    folder, programs = tmp_path / "work", tmp_path / "programs"
    for each in (folder, programs):
        each.mkdir()
    write_program(programs)
    environment = os.environ | {"PATH": f"{programs}:{PROGRAM.parent}:{os.environ['PATH']}"}
    with contextlib.ExitStack() as stack:
        if any(block.run == "vault" for block in blocks):
            vault = stack.enter_context(LabVault())
            environment["VAULT_URL"] = vault.url
            environment["VIRT_SSE_VAULT_CREDENTIAL"] = str(vault.administrator_path)
        if not any("virt-sse host init" in block.text for block in blocks):
            subprocess.run([PROGRAM, "host", "init"], check=True, capture_output=True)
        for block in blocks:
            done = subprocess.run(
                ["sh", "-eu", "-c", block.text],
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=120,
            )
            assert done.returncode == 0, f"{document.name}:{block.line}:\n{done.stdout}"


@pytest.mark.parametrize("block", single("config"))
def test_the_example_configurations_load(block: Block, root: Path) -> None:
    path = root / "etc/virt-sse/config.toml"
    path.parent.mkdir(parents=True)
    path.write_text(block.text, "utf-8")
    config.Config.load(root)


@pytest.mark.parametrize("block", single("vectors"))
def test_programs_agree_with_the_vectors(block: Block) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", block.text],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr


def test_the_first_page_has_an_example_that_runs() -> None:
    assert "README.md" in [document.name for document in marked("host")]


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_marks_have_a_block_of_their_language(document: Document) -> None:
    assert document.stray_marks == []
    for block in document.blocks:
        if block.run is not None:
            assert LANGUAGES.get(block.run) == block.language, f"{document.name}:{block.line}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_links_lead_to_existing_headings(document: Document) -> None:
    assert broken_links(document) == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_commands_and_their_options_exist(document: Document) -> None:
    assert unknown_commands(document, reference.command_line()) == []


def test_every_option_of_the_configuration_is_described() -> None:
    text = (CHECKOUT / "backend/docs/reference/configuration.md").read_text("utf-8")
    options = sorted(config_file.options())
    assert len(options) > 15
    assert [option for _, option in options if not re.search(rf"`{option}\b", text)] == []
    tables = ["key-providers", *(table for table, _ in options)]
    assert [table for table in tables if not re.search(rf"\[{table}[\].]", text)] == []


def test_every_metric_is_described() -> None:
    text = (CHECKOUT / "backend/docs/reference/metrics.md").read_text("utf-8")
    names = re.findall(r"^# TYPE (\w+) ", Metrics().render().decode(), re.MULTILINE)
    assert len(names) > 10
    names = [name for name in names if not name.endswith("_created")]
    assert [
        name for name in names if not re.search(rf"\b{name.removesuffix('_total')}(_total)?\b", text)
    ] == []


def test_readers_of_documents_find_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text(
        "# A `page` [of](#twice) two, parts\n## Twice\n## Twice\n"
        "[good](#a-page-of-two-parts) [good](#twice-1) [bad](#twice-2) [bad](nowhere.md) [far](https://x.invalid)\n"
        "`[no](link)` `virt-sse disk create NAME --size 1G`\n"
        "`virt-sse disk make` `vm show --sise` `disk of mine`\n"
        "`virt-sse NOUN VERB --help`, `virt-sse-agent.socket`\n"
        "<!-- run: host -->\n\n<!-- run: config -->\n```toml\nx = 1\n```\n"
        "```console\n# virt-sse host \\\n    hsm lokk\nvirt-sse: error: no\n```\n"
        "```sh\nx=$(virt-sse vault access grant me) | virt-sse key list # and others\n```\n"
    )
    document = Document(path)
    assert document.stray_marks == [8]
    assert [(block.run, block.language) for block in document.blocks] == [
        ("config", "toml"),
        (None, "console"),
        (None, "sh"),
    ]
    assert broken_links(document) == ["#twice-2", "nowhere.md"]
    assert unknown_commands(document, reference.command_line()) == [
        "virt-sse disk make",
        "virt-sse vm show --sise",
        "virt-sse disk of mine",
        "virt-sse host hsm lokk",
        "virt-sse vault access grant me",
    ]


def test_the_architecture_names_existing_modules() -> None:
    text = (CHECKOUT / "backend/docs/architecture.md").read_text("utf-8")
    names = set(re.findall(r"`([\w/]+\.py)`", text))
    assert len(names) > 40
    existing = [
        path.relative_to(CHECKOUT).as_posix()
        for folder in ("backend", "plugins")
        for path in (CHECKOUT / folder).rglob("*.py")
    ]
    assert [name for name in sorted(names) if not any(path.endswith(f"/{name}") for path in existing)] == []
