/**
 * What the slider strip shows for a text, and the text for what it shows. No DOM here.
 *
 * A slot is one slider. Where the model's blocks are known it is one block; else one entry of the text.
 *
 * @typedef {import("./block_overrides.js").NoiseEnd} NoiseEnd
 * @typedef {import("./block_overrides.js").Block} Block
 * @typedef {object} Slot
 * @property {string} name as the text writes it: "3", "single.3", "0-2"
 * @property {string | null} type block type, null where the text needs none
 * @property {number} first
 * @property {number} last the same as first but for entries of an unknown model
 * @property {number} share of the sampling steps in FP16, 0 to 1
 * @property {NoiseEnd} end
 */

import { formatBlockOverrides, formatRange, parseBlockOverrides, resolveBlockOverrides } from "./block_overrides.js";

const SIDE_STACK = /_refiner$|^vace$/; // stacks beside the main blocks: "the last n" doesn't mean these
const MAX_HISTORY = 200;
const COALESCE_MS = 800;

/**
 * @param {string} text
 * @param {Block[] | null} blocks of the model, null while they aren't known
 * @returns {{slots: Slot[], error: string | null}} with an error, all shares are 0
 */
export function readSlots(text, blocks) {
  let overrides = [];
  let shares = new Map();
  let error = null;
  try {
    overrides = parseBlockOverrides(text);
    if (blocks) shares = resolveBlockOverrides(overrides, blocks);
  } catch (problem) {
    error = problem.message;
  }
  if (!blocks) return { slots: overrides.map((override) => ({ name: entryName(override), ...override })), error };
  const severalTypes = blockTypes(blocks).length > 1;
  const slots = blocks.map((block) => ({
    name: block.name,
    type: severalTypes ? block.type : null,
    first: block.index,
    last: block.index,
    share: 0,
    end: "high",
    ...shares.get(block),
  }));
  return { slots, error };
}

/**
 * The text for the slots: neighbours that agree become a range.
 *
 * @param {Slot[]} slots
 * @param {boolean} keepsEntries one entry per slot, also for a share of 0: the slots are those of an unknown model
 * @returns {string}
 */
export function writeSlots(slots, keepsEntries) {
  const overrides = [];
  for (const { type, first, last, share, end } of slots) {
    const previous = overrides.at(-1);
    if (!keepsEntries && share === 0) continue;
    const continues = previous && previous.type === type && previous.last + 1 === first;
    if (!keepsEntries && continues && previous.share === share && previous.end === end) {
      previous.last = last;
    } else {
      overrides.push({ type, first, last, share, end });
    }
  }
  return formatBlockOverrides(overrides);
}

/**
 * The slots between two points of a drag get shares on the line between them.
 *
 * @param {Slot[]} slots
 * @param {{slot: number, share: number}} from
 * @param {{slot: number, share: number}} to
 * @returns {Slot[]}
 */
export function paintShares(slots, from, to) {
  return slots.map((slot, position) => {
    if (!isBetween(position, from.slot, to.slot)) return slot;
    const way = from.slot === to.slot ? 1 : (position - from.slot) / (to.slot - from.slot);
    return withShare(slot, from.share + way * (to.share - from.share));
  });
}

/**
 * The slots from one to another get an end of the noise schedule; those without a share have none to get.
 *
 * @param {Slot[]} slots
 * @param {number} from
 * @param {number} to
 * @param {NoiseEnd} end
 * @returns {Slot[]}
 */
export function paintEnd(slots, from, to, end) {
  return slots.map((slot, position) => (isBetween(position, from, to) && slot.share > 0 ? { ...slot, end } : slot));
}

/**
 * @param {Slot[]} slots
 * @param {number} position
 * @param {number} share is rounded to hundredths and kept in 0 to 1
 * @returns {Slot[]}
 */
export function setShare(slots, position, share) {
  return slots.map((slot, index) => (index === position ? withShare(slot, share) : slot));
}

/**
 * @param {Slot[]} slots
 * @param {"first" | "last" | "all" | "none"} preset "first" and "last" add to what is there
 * @param {number} count for "first" and "last": how many of the main blocks
 * @returns {Slot[]}
 */
export function applyPreset(slots, preset, count) {
  if (preset === "all") return slots.map((slot) => withShare(slot, 1, "high"));
  if (preset === "none") return slots.map((slot) => withShare(slot, 0));
  const main = slots.filter(({ type }) => type === null || !SIDE_STACK.test(type));
  const chosen = new Set(preset === "first" ? main.slice(0, count) : main.slice(Math.max(main.length - count, 0)));
  return slots.map((slot) => (chosen.has(slot) ? withShare(slot, 1, "high") : slot));
}

/**
 * @param {Block[]} blocks
 * @returns {string[]} in order
 */
export function blockTypes(blocks) {
  return [...new Set(blocks.map((block) => block.type))];
}

/** Undo and redo of the text. */
export class TextHistory {
  /** @param {string} text */
  constructor(text) {
    this.reset(text);
  }

  /** @param {string} text what there is now; nothing to undo */
  reset(text) {
    this.current = text;
    this.past = [];
    this.future = [];
    this.lastGesture = null;
  }

  /**
   * @param {string} text
   * @param {string | null} gesture changes of one gesture that follow each other closely are undone as one
   * @param {number} now milliseconds
   */
  record(text, gesture = null, now = Date.now()) {
    if (text === this.current) return;
    const goesOn = gesture !== null && gesture === this.lastGesture && now - this.lastTime < COALESCE_MS;
    if (!goesOn) this.past.push(this.current);
    if (this.past.length > MAX_HISTORY) this.past.shift();
    this.current = text;
    this.future = [];
    this.lastGesture = gesture;
    this.lastTime = now;
  }

  /** @returns {string} the text before */
  undo() {
    return this.#move(this.past, this.future);
  }

  /** @returns {string} the text that undo() left */
  redo() {
    return this.#move(this.future, this.past);
  }

  #move(from, to) {
    if (from.length) {
      to.push(this.current);
      this.current = from.pop();
      this.lastGesture = null;
    }
    return this.current;
  }
}

function withShare(slot, share, end = slot.end) {
  const rounded = Math.round(Math.min(Math.max(share, 0), 1) * 100) / 100;
  return { ...slot, share: rounded, end: rounded === 0 ? "high" : end };
}

function isBetween(position, one, other) {
  return position >= Math.min(one, other) && position <= Math.max(one, other);
}

function entryName({ type, first, last }) {
  return (type === null ? "" : `${type}.`) + formatRange(first, last);
}
