/** What the strip shows for a text, and the text for what it shows. */

import assert from "node:assert/strict";
import { test } from "node:test";

import { heatColour } from "../../nodes/web/heat.js";
import {
  applyPreset,
  paintEnd,
  paintShares,
  readSlots,
  setShare,
  TextHistory,
  writeSlots,
} from "../../nodes/web/strip_state.js";
import { blocksOf } from "./layouts.mjs";

const WAN = blocksOf({ double: 6 });
const FLUX = blocksOf({ double: 2, single: 3 });
const VACE = blocksOf({ double: 4, vace: 2 });

function slotsOf(text, blocks = WAN) {
  const { slots, error } = readSlots(text, blocks);
  assert.equal(error, null);
  return slots;
}

function write(slots) {
  return writeSlots(slots, false);
}

for (const [text, blocks] of [
  ["", WAN],
  ["0-2: 1, 4: 0.5 low", WAN],
  ["0: 0.1, 1: 0.2, 2-5: 0.3", WAN],
  ["double.0-1: 1, single.0-2: 1", FLUX],
  ["double.1: 0.25 low, single.2: 0.25", FLUX],
  ["double.0: 1, single.1: 1", FLUX],
]) {
  test(`what is written is what was read: ${text}`, () => {
    assert.equal(write(slotsOf(text, blocks)), text);
  });
}

test("neighbours that agree become a range, but not across types, shares and ends", () => {
  assert.equal(write(slotsOf("0: 1, 1: 1, 2: 0.5, 3: 0.5 low, 4: 0")), "0-1: 1, 2: 0.5, 3: 0.5 low");
  assert.equal(write(slotsOf("0-4: 1", FLUX)), "double.0-1: 1, single.0-2: 1");
  assert.equal(write(slotsOf("0: 1, 2: 1")), "0: 1, 2: 1");
});

test("without blocks the slots are the entries, and stay at a share of 0", () => {
  const slots = slotsOf("0-2: 1, single.5: 0.5 low", null);
  assert.deepEqual(
    slots.map(({ name }) => name),
    ["0-2", "single.5"],
  );
  assert.equal(writeSlots(setShare(slots, 0, 0), true), "0-2: 0, single.5: 0.5 low");
  assert.equal(writeSlots(slotsOf("0: 1, 1: 1", null), true), "0: 1, 1: 1");
});

test("an error leaves all sliders down and says why", () => {
  for (const [text, part] of [
    ["0: 1, x", "not understood"],
    ["9: 1", "the model has no block 9"],
  ]) {
    const { slots, error } = readSlots(text, WAN);
    assert.match(error, new RegExp(part));
    assert.deepEqual(
      slots.map(({ share }) => share),
      [0, 0, 0, 0, 0, 0],
    );
  }
});

test("a fast drag paints the line between two of its points, in both directions", () => {
  const slots = slotsOf("");
  assert.equal(write(paintShares(slots, { slot: 1, share: 1 }, { slot: 4, share: 0.4 })), "1: 1, 2: 0.8, 3: 0.6, 4: 0.4");
  assert.equal(write(paintShares(slots, { slot: 4, share: 0.4 }, { slot: 1, share: 1 })), "1: 1, 2: 0.8, 3: 0.6, 4: 0.4");
  assert.equal(write(paintShares(slots, { slot: 2, share: 0.1 }, { slot: 2, share: 0.7 })), "2: 0.7");
});

test("shares are hundredths of 0 to 1", () => {
  const slots = slotsOf("");
  assert.equal(write(setShare(slots, 0, 0.1 + 0.2)), "0: 0.3");
  assert.equal(write(setShare(slots, 0, 7)), "0: 1");
  assert.equal(write(setShare(slots, 0, -7)), "");
});

test("the noise end is kept while a share changes, and forgotten with it", () => {
  const low = slotsOf("0: 0.5 low");
  assert.equal(write(setShare(low, 0, 0.7)), "0: 0.7 low");
  assert.equal(write(setShare(setShare(low, 0, 0), 0, 0.7)), "0: 0.7");
});

test("a noise end is painted where there is a share", () => {
  assert.equal(write(paintEnd(slotsOf("0: 1, 2: 0.5, 4: 1"), 3, 0, "low")), "0: 1 low, 2: 0.5 low, 4: 1");
  assert.equal(write(setShare(paintEnd(slotsOf(""), 1, 1, "low"), 1, 0.5)), "1: 0.5");
});

test("presets: first and last add, all and none replace", () => {
  const slots = slotsOf("3: 0.5 low");
  assert.equal(write(applyPreset(slots, "first", 2)), "0-1: 1, 3: 0.5 low");
  assert.equal(write(applyPreset(slots, "last", 3)), "3-5: 1");
  assert.equal(write(applyPreset(slots, "last", 99)), "0-5: 1");
  assert.equal(write(applyPreset(slots, "all", 2)), "0-5: 1");
  assert.equal(write(applyPreset(slots, "none", 2)), "");
});

test("the last blocks are those of the main stack", () => {
  assert.equal(write(applyPreset(slotsOf("", VACE), "last", 1)), "double.3: 1");
  assert.equal(write(applyPreset(slotsOf("", FLUX), "last", 1)), "single.2: 1");
});

test("undo and redo walk through the texts", () => {
  const history = new TextHistory("a");
  history.record("b");
  history.record("b");
  history.record("c");
  assert.deepEqual([history.undo(), history.undo(), history.undo()], ["b", "a", "a"]);
  assert.deepEqual([history.redo(), history.redo(), history.redo()], ["b", "c", "c"]);
  history.undo();
  history.record("d");
  assert.equal(history.redo(), "d");
  assert.equal(history.undo(), "b");
});

test("one gesture is undone as one, a pause or another gesture begins a new one", () => {
  const history = new TextHistory("a");
  history.record("b", "wheel 1", 0);
  history.record("c", "wheel 1", 500);
  history.record("d", "wheel 1", 1000);
  history.record("e", "wheel 2", 1100);
  history.record("f", "wheel 2", 5000);
  assert.deepEqual([history.undo(), history.undo(), history.undo()], ["e", "d", "a"]);
});

test("the colours run from blue over sand to red", () => {
  assert.equal(heatColour(0), "rgb(74 148 184)");
  assert.equal(heatColour(0.5), "rgb(222 186 104)");
  assert.equal(heatColour(1), "rgb(222 88 72)");
  assert.equal(heatColour(2), heatColour(1));
});
