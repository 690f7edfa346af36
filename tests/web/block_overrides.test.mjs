/** The browser's twin of sage_kernels/block_overrides.py, held to the same table of cases. */

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { test } from "node:test";

import {
  BlockOverrideError,
  formatBlockOverrides,
  parseBlockOverrides,
  resolveBlockOverrides,
} from "../../nodes/web/block_overrides.js";
import { blocksOf } from "./layouts.mjs";

const CASES = JSON.parse(readFileSync(new URL("../block_override_cases.json", import.meta.url), "utf8"));

function throwsMessage(action, message) {
  assert.throws(action, (error) => {
    assert.ok(error instanceof BlockOverrideError);
    assert.equal(error.message, message);
    return true;
  });
}

for (const { text, canonical, error } of CASES.parse) {
  test(`parse ${JSON.stringify(text)}`, () => {
    if (error) return throwsMessage(() => parseBlockOverrides(text), error);
    const overrides = parseBlockOverrides(text);
    assert.equal(formatBlockOverrides(overrides), canonical);
    assert.deepEqual(parseBlockOverrides(canonical), overrides.map((override) => ({ ...override, share: override.share + 0 })));
  });
}

for (const { text, counts, shares, error } of CASES.resolve) {
  test(`resolve ${JSON.stringify(text)} in ${JSON.stringify(counts)}`, () => {
    const resolve = () => resolveBlockOverrides(parseBlockOverrides(text), blocksOf(counts));
    if (error) return throwsMessage(resolve, error);
    const actual = [...resolve()].map(([block, { share, end }]) => [block.name, [share, end]]);
    assert.deepEqual(Object.fromEntries(actual), shares);
  });
}
