"""Coverage-guided fuzzing of a parser with Atheris: ``python tests/fuzz PARSER [libFuzzer's options]``.

``python tests/fuzz`` lists the parsers. Inputs that reach new code are kept in ``.fuzz/PARSER``, for the next
run. A failing input is printed as a Python literal, for ``tests/support/regressions.py``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import atheris

sys.path.insert(0, str(Path(__file__).parents[1]))
with atheris.instrument_imports(include=["virt_sse", "virt_sse_plugins"]):
    from support.parsers import PARSERS

from support.fuzzing import require_contract

_LONGEST = 1 << 16


def main() -> None:
    """Fuzz the parser named on the command line, until the options' limits or a failing input."""
    if len(sys.argv) == 1:
        print(*(parser.name for parser in PARSERS), sep="\n")
        return
    name, *options = sys.argv[1:]
    found = [parser for parser in PARSERS if parser.name == name]
    if not found:
        sys.exit(f"no parser {name!r}; 'python tests/fuzz' lists them")
    (parser,) = found
    corpus = Path(".fuzz") / name
    corpus.mkdir(parents=True, exist_ok=True)
    for number, content in enumerate(parser.seeds):
        (corpus / f"seed-{number}").write_bytes(content)
    with TemporaryDirectory() as folder, parser.opened(Path(folder)) as parse:

        def check(content: bytes) -> None:
            try:
                require_contract(parser, parse, content)
            except BaseException:
                print(f"failing input of {name}: {content!r}", file=sys.stderr)
                raise

        limits = [f"-max_len={_LONGEST}", f"-artifact_prefix={corpus}/", "-rss_limit_mb=2048", "-timeout=10"]
        atheris.Setup([sys.argv[0], str(corpus), *limits, *options], check)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
