"""Sector ciphers, with their names in QEMU and cryptsetup."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from virt_sse.errors import InvalidValueError

_ALGORITHMS = ("aes-256", "serpent-256", "twofish-256")
_MODES = {"xts": "plain64", "cbc": "essiv"}


@dataclass(frozen=True, slots=True)
class Cipher:
    """A block cipher with its key size in bits, and its mode.

    The initial vectors follow from the mode as in LUKS practice: ``plain64`` for xts,
    ``essiv:sha256`` for cbc.
    """

    algorithm: str
    mode: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``aes-256-xts`` or ``aes-256-cbc-essiv:sha256``.

        :raise InvalidValueError: When *text* names no cipher of QEMU's LUKS driver.
        """
        for algorithm in _ALGORITHMS:
            for mode in _MODES:
                cipher = cls(algorithm, mode)
                if text in (str(cipher), f"{algorithm}-{mode}"):
                    return cipher
        raise InvalidValueError(
            f"unknown cipher {text[:40]!r}", hint=f"known ciphers: {', '.join(map(str, KNOWN))}"
        )

    def __str__(self) -> str:
        return f"{self.algorithm}-{self.mode}" + ("-essiv:sha256" if self.mode == "cbc" else "")

    @property
    def volume_key_bits(self) -> int:
        """The size of the LUKS volume key; xts takes two keys."""
        return 512 if self.mode == "xts" else 256

    @property
    def cryptsetup(self) -> str:
        """The cipher specification in the form of cryptsetup(8) ``--cipher``."""
        name = self.algorithm.removesuffix("-256")
        return f"{name}-xts-plain64" if self.mode == "xts" else f"{name}-cbc-essiv:sha256"

    @property
    def qemu(self) -> dict[str, str]:
        """The options of QEMU's ``QCryptoBlockCreateOptionsLUKS``, without prefix."""
        options = {"cipher-alg": self.algorithm, "cipher-mode": self.mode, "ivgen-alg": _MODES[self.mode]}
        if self.mode == "cbc":
            options["ivgen-hash-alg"] = "sha256"
        return options


AES_256_XTS = Cipher("aes-256", "xts")
AES_256_CBC = Cipher("aes-256", "cbc")
KNOWN = tuple(Cipher(algorithm, mode) for algorithm in _ALGORITHMS for mode in _MODES)
"""All ciphers of QEMU's LUKS driver. A build of QEMU may lack some of them."""
