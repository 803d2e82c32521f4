"""Keys in a SoftHSM token: unwraps per second, against the same private operation in this process."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.keywrap import aes_key_unwrap, aes_key_wrap

from measurement import Measurement, Row, Run, Unit, alternate
from virt_sse.model.keys import Dek, DekContext, ProviderConfig

_CONTEXT = DekContext(uuid.UUID(int=1), "service")
_KEK = bytes(32)


def measure(bench: Run) -> Iterator[Row]:
    """Measure each size of RSA key, and AES. The peer does the same work in this process, without a token."""
    from virt_sse.lab.tokens import LabHsm
    from virt_sse.pkcs11.token import KeyKind
    from virt_sse_plugins.key_providers.hsm_simulated import HsmSimulatedKeyProvider

    turns = bench.amount(15, quick=3)
    with LabHsm() as hsm, hsm.token() as token:
        config = ProviderConfig(bench.scratch / "hsm", token.options)
        provider = HsmSimulatedKeyProvider.from_config(config)
        keys = provider.keys()
        dek = Dek.generate()
        for bits in (2048, 3072, 4096):
            keys.create(f"rsa-{bits}", KeyKind.RSA, bits)
            wrapped = provider.wrap(dek, provider.current_key(f"rsa-{bits}"), context=_CONTEXT)
            ours, peer = _rates(
                bench.amount(20, quick=5),
                turns,
                lambda wrapped=wrapped: provider.unwrap(wrapped, context=_CONTEXT),  # type: ignore[misc]
                _rsa_in_process(bits, dek),
            )
            modes = keys.token.oaep_modes()
            yield Row(
                f"hsm/rsa-{bits}",
                f"unwrap in a token, RSA {bits}, OAEP-256 on the {modes['sha256'].value}",
                ours,
                peer,
                "cryptography",
            )
        keys.create("aes-256", KeyKind.AES, 256)
        wrapped = provider.wrap(dek, provider.current_key("aes-256"), context=_CONTEXT)
        by_aes = aes_key_wrap(_KEK, _CONTEXT.bind(dek))
        ours, peer = _rates(
            bench.amount(100, quick=20),
            turns,
            lambda: provider.unwrap(wrapped, context=_CONTEXT),
            lambda: _CONTEXT.release(aes_key_unwrap(_KEK, by_aes)),
        )
        yield Row("hsm/aes-256", "unwrap in a token, AES-256 key wrap", ours, peer, "cryptography")
        provider.close()


def _rsa_in_process(bits: int, dek: Dek) -> Callable[[], object]:
    private = rsa.generate_private_key(65537, bits)
    scheme = padding.OAEP(padding.MGF1(hashes.SHA256()), hashes.SHA256(), label=None)
    ciphertext = private.public_key().encrypt(_CONTEXT.bind(dek), scheme)
    return lambda: _CONTEXT.release(private.decrypt(ciphertext, scheme))


def _rates(
    unwraps: int, turns: int, ours: Callable[[], object], peer: Callable[[], object]
) -> tuple[Measurement, ...]:
    """Rates per second of both actions, in *turns* of *unwraps* repetitions each."""

    def many(action: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(unwraps):
                action()

        return run

    return tuple(
        Measurement.median([unwraps / sample for sample in taken.samples], Unit.PER_SECOND)
        for taken in alternate(turns, many(ours), many(peer))
    )
