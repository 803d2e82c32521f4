"""Each image, envelope and domain of the corpus is refused for the expected reason, or accepted."""

from __future__ import annotations

from pathlib import Path

import pytest

from support import corpus
from support.corpus import Case
from support.parsers.domains import read_parts
from virt_sse.backend import Backend
from virt_sse.errors import ConfigError, EnvelopeError, ImageFormatError, InvalidValueError, VirtSseError
from virt_sse.libvirt.domain_definition import DomainDefinition
from virt_sse.model.envelope import Envelope
from virt_sse.qemu import image_file, image_header

IMAGES = list(corpus.images())
ENVELOPES = list(corpus.envelopes())
DOMAINS = list(corpus.domains())


def assert_refused(case: Case, error: VirtSseError) -> None:
    assert any(reason in str(error) for reason in case.reasons), str(error)
    assert str(error).isprintable()


def test_the_corpus_is_the_same_at_each_run() -> None:
    assert list(corpus.images()) == IMAGES
    assert list(corpus.images(seed=1)) != IMAGES


@pytest.mark.parametrize("case", IMAGES, ids=lambda case: case.name)
def test_an_image_is_refused_for_the_expected_reason_or_accepted(case: Case, tmp_path: Path) -> None:
    path = corpus.write_image(case, tmp_path / "image")
    with image_file.opened(path) as descriptor:
        if not case.reasons:
            image_format = image_file.probe_format(descriptor)
            assert image_header.validate(descriptor, image_format)[1] > 0
            return
        with pytest.raises(ImageFormatError) as caught:
            image_header.validate(descriptor, image_file.probe_format(descriptor))
        assert_refused(case, caught.value)


def test_no_hostile_image_is_adopted(backend: Backend, tmp_path: Path) -> None:
    """Nor does the attempt change an image, or leave a disk in the store."""
    path = tmp_path / "image"
    for case in IMAGES:
        if case.reasons:
            corpus.write_image(case, path)
            before = path.read_bytes()
            with pytest.raises(ImageFormatError) as caught:
                backend.disks.adopt(path)
            assert_refused(case, caught.value)
            assert path.read_bytes() == before, case.name
    assert backend.disks.all() == []


@pytest.mark.parametrize("case", ENVELOPES, ids=lambda case: case.name)
def test_an_envelope_is_refused_for_the_expected_reason_or_accepted(case: Case) -> None:
    if not case.reasons:
        assert Envelope.decode(case.content).encode() == case.content
        return
    with pytest.raises(EnvelopeError) as caught:
        Envelope.decode(case.content)
    assert_refused(case, caught.value)


@pytest.mark.parametrize("case", DOMAINS, ids=lambda case: case.name)
def test_a_domain_is_refused_for_the_expected_reason_or_accepted(case: Case) -> None:
    text = case.content.decode(errors="surrogateescape")
    if not case.reasons:
        read_parts(DomainDefinition.parse(text))
        return
    with pytest.raises((InvalidValueError, ConfigError)) as caught:
        read_parts(DomainDefinition.parse(text))
    assert_refused(case, caught.value)


@pytest.mark.parametrize("case", DOMAINS, ids=lambda case: case.name)
def test_any_domain_is_salvaged_for_its_end(case: Case) -> None:
    """The release of a domain and the watch of its keys read as much as can be read."""
    domain = DomainDefinition.salvage(case.content.decode(errors="surrogateescape"))
    assert all(use.secret.uuid if use.secret else use.disk_id for use in domain.our_disks)
