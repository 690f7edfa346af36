"""The table of cases that sage_kernels.block_overrides shares with its twin in the browser."""

import json
from pathlib import Path

import pytest

from sage_kernels.block_overrides import (
    BlockLayout,
    BlockOverrideError,
    format_block_overrides,
    parse_block_overrides,
    resolve_block_overrides,
)

CASES = json.loads((Path(__file__).parent / "block_override_cases.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", CASES["parse"], ids=lambda case: ascii(case["text"]))
def test_text_is_read_or_refused(case):
    if "error" in case:
        with pytest.raises(BlockOverrideError) as caught:
            parse_block_overrides(case["text"])
        assert str(caught.value) == case["error"]
    else:
        assert format_block_overrides(parse_block_overrides(case["text"])) == case["canonical"]


@pytest.mark.parametrize("case", CASES["resolve"], ids=lambda case: f"{case['text']} in {case['counts']}")
def test_overrides_are_laid_over_a_model(case):
    layout = BlockLayout(case["counts"])

    def resolve():
        return resolve_block_overrides(parse_block_overrides(case["text"]), layout)

    if "error" in case:
        with pytest.raises(BlockOverrideError) as caught:
            resolve()
        assert str(caught.value) == case["error"]
    else:
        actual = {layout.name(block): [step.share, step.end] for block, step in resolve().items()}
        assert actual == case["shares"]
