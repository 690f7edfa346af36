/** The strip of sliders as a DOM element: one slim slider per block, drawn like a graphic equaliser. */

import { blockTypes, setShare } from "./strip_state.js";
import { heatColour, HEAT_GRADIENT } from "./heat.js";
import { StripGestures } from "./strip_gestures.js";

const HELP = [
  "Share of the sampling steps that each block runs in FP16: bottom none, top all.",
  "Drag across the sliders to paint. Double click: back to low precision.",
  "Shift-click, or click the mark below a slider: the steps at the high-noise end (the start) or, hatched, the low-noise end.",
  "Once clicked: wheel and shift+arrows 1 %, arrows 5 % and to the neighbour, Page 25 %, Home and End first and last block,",
  "L noise end, Delete resets, Ctrl+Z and Ctrl+Y undo and redo.",
].join("\n");
const UNKNOWN_BLOCKS = "The blocks are known after the first run; until then these are the entries of the text.";
const UNKNOWN_EMPTY = "The blocks are known after the first run; until then write them into fp16_blocks.";
const LINKED = "fp16_blocks comes from another node.";

/**
 * @typedef {object} StripContent
 * @property {import("./strip_state.js").Slot[]} slots
 * @property {import("./block_overrides.js").Block[] | null} blocks
 * @property {string | null} error
 * @property {string} family
 * @property {number[] | null} sensitivity one number per block, 0 is harmless
 * @property {boolean} linked the text comes from another node
 * @property {boolean} canUndo
 * @property {boolean} canRedo
 * @property {string} note why the blocks aren't known, if the server said
 */

export class SliderStrip {
  /**
   * @param {object} actions
   * @param {(slots: import("./strip_state.js").Slot[], gesture?: string) => void} actions.edit
   * @param {(preset: string, count: number) => void} actions.preset
   * @param {() => void} actions.undo
   * @param {() => void} actions.redo
   * @param {() => void} actions.commit a gesture is complete
   * @param {(event: WheelEvent) => void} actions.passWheel a wheel event that isn't for the strip
   */
  constructor(actions) {
    this.actions = actions;
    this.active = 0;
    this.element = make("div", "sage3-strip", { role: "group", ariaLabel: "FP16 share of the steps, block by block" });
    this.element.dataset.captureWheel = "true"; // Nodes 2.0 leaves the wheel to a focused element that says so
    // The canvas blurs a DOM widget when something else is pressed, but only the element itself.
    this.element.blur = () => this.element.contains(document.activeElement) && document.activeElement.blur();
    this.model = make("span", "sage3-model");
    this.legend = make("span", "sage3-legend", { title: "colour: harmless to sensitive in low precision" });
    this.legend.style.background = HEAT_GRADIENT;
    this.readout = make("span", "sage3-readout");
    this.plot = make("div", "sage3-plot", { title: HELP });
    this.foot = this.#makeFoot();
    this.status = make("div", "sage3-status", { role: "status" });
    const head = make("div", "sage3-head");
    head.append(this.model, this.legend, this.readout);
    this.element.append(head, this.plot, this.foot, this.status);
    this.sliders = [];
    new StripGestures(this);
  }

  /** @returns {boolean} whether the sliders may be moved */
  get editable() {
    return !this.content.error && !this.content.linked;
  }

  /** @param {StripContent} content */
  show(content) {
    this.content = content;
    const { slots, blocks, sensitivity } = content;
    this.#build(slots, blocks);
    const highest = Math.max(...(sensitivity ?? []), Number.MIN_VALUE);
    slots.forEach((slot, position) => {
      const { element, input } = this.sliders[position];
      element.style.setProperty("--share", slot.share);
      element.dataset.end = slot.end;
      setHeat(element, sensitivity && sensitivity[position] / highest);
      input.value = Math.round(slot.share * 100);
      input.disabled = !this.editable;
      input.setAttribute("aria-valuetext", describe(slot));
    });
    this.legend.hidden = !sensitivity;
    this.element.dataset.state = content.error ? "error" : content.linked ? "linked" : "ready";
    this.status.textContent = content.error ?? (content.linked ? LINKED : blocks ? "" : unknownText(content));
    this.#showModel();
    this.showReadout();
    for (const [name, button] of Object.entries(this.buttons)) button.disabled = !this.#isOffered(name);
  }

  /** @param {number | null} position of the slot to describe; null: the strip as a whole */
  showReadout(position = null) {
    const { slots, blocks } = this.content;
    const slot = slots[position];
    if (slot) {
      this.readout.textContent = `${blocks ? "block " : ""}${slot.name}: ${describe(slot)}`;
    } else {
      const total = slots.reduce((sum, { share }) => sum + share, 0);
      this.readout.textContent = blocks && !this.content.error ? `${percent(total / slots.length)} in FP16` : "";
    }
  }

  /**
   * Give the keyboard to a slider.
   *
   * @param {number} position
   */
  focus(position) {
    this.active = position;
    this.sliders.forEach(({ input }, index) => (input.tabIndex = index === position ? 0 : -1));
    this.sliders[position]?.input.focus({ preventScroll: true });
    this.showReadout(position);
  }

  #isOffered(name) {
    const { slots, linked, error, canUndo, canRedo } = this.content;
    if (linked) return false;
    if (name === "undo") return canUndo;
    if (name === "redo") return canRedo;
    // "none" is the way out where the text doesn't fit the model.
    return slots.length > 0 && (!error || name === "none");
  }

  #showModel() {
    const { blocks, family } = this.content;
    this.model.textContent = blocks ? `${family} · ${blocks.length} block${blocks.length === 1 ? "" : "s"}` : "unknown model";
    this.model.title = this.model.textContent;
  }

  #build(slots, blocks) {
    const shape = JSON.stringify([slots.map(({ name }) => name), Boolean(blocks)]);
    if (shape === this.shape) return;
    this.shape = shape;
    this.active = Math.min(this.active, Math.max(slots.length - 1, 0));
    this.sliders = slots.map((slot, position) => this.#makeSlider(slot, position, slots.length, Boolean(blocks)));
    this.plot.toggleAttribute("data-entries", !blocks);
    const types = blocks ? blockTypes(blocks) : [];
    if (types.length > 1) {
      const groups = types.map((type) => {
        const members = this.sliders.filter((_, position) => blocks[position].type === type);
        return makeGroup(members, type);
      });
      this.plot.replaceChildren(...groups);
    } else {
      this.plot.replaceChildren(makeGroup(this.sliders, null));
    }
  }

  #makeSlider(slot, position, count, known) {
    const element = make("div", "sage3-slot");
    const track = make("div", "sage3-track");
    track.append(make("div", "sage3-fill"));
    const input = make("input", "", { type: "range", min: "0", max: "100", step: "1" });
    input.tabIndex = position === this.active ? 0 : -1;
    input.setAttribute("aria-label", `${known ? "block " : ""}${slot.name}`);
    input.setAttribute("aria-orientation", "vertical");
    // Assistive technology moves the native slider.
    input.addEventListener("input", () => {
      this.actions.edit(setShare(this.content.slots, position, Number(input.value) / 100), `input ${position}`);
    });
    input.addEventListener("change", () => this.actions.commit());
    input.addEventListener("focus", () => {
      this.active = position;
      this.showReadout(position);
    });
    input.addEventListener("blur", () => this.showReadout());
    element.append(track, input);
    if (!known || slot.first % tickInterval(count) === 0) {
      element.append(make("span", "sage3-tick", { textContent: known ? String(slot.first) : slot.name }));
    }
    return { element, track, input };
  }

  #makeFoot() {
    const foot = make("div", "sage3-foot");
    const count = make("input", "", { type: "number", min: "1", value: "2", title: "how many blocks First and Last take" });
    count.setAttribute("aria-label", count.title);
    const preset = (name) => () => this.actions.preset(name, Math.max(1, Math.round(Number(count.value)) || 1));
    const button = (label, title, action) => {
      const element = make("button", "", { type: "button", textContent: label, title });
      element.addEventListener("click", action);
      return element;
    };
    this.buttons = {
      first: button("First", "the first blocks in FP16 at all steps, too", preset("first")),
      last: button("Last", "the last blocks in FP16 at all steps, too", preset("last")),
      all: button("All", "all blocks in FP16", preset("all")),
      none: button("None", "no block in FP16: clears the text", preset("none")),
      undo: button("↶", "undo (Ctrl+Z in the strip)", () => this.actions.undo()),
      redo: button("↷", "redo (Ctrl+Y in the strip)", () => this.actions.redo()),
    };
    const { first, last, all, none, undo, redo } = this.buttons;
    foot.append(first, count, last, all, none, make("span", "sage3-space"), undo, redo);
    return foot;
  }
}

function makeGroup(sliders, type) {
  const group = make("div", "sage3-group");
  if (type !== null) group.dataset.type = type;
  group.style.setProperty("--count", sliders.length);
  group.append(...sliders.map(({ element }) => element));
  return group;
}

function setHeat(element, heat) {
  if (heat === null) {
    element.style.removeProperty("--heat");
    element.style.removeProperty("--tint");
  } else {
    element.style.setProperty("--heat", heatColour(heat));
    element.style.setProperty("--tint", "30%");
  }
}

function unknownText({ slots, note }) {
  return [note, slots.length ? UNKNOWN_BLOCKS : UNKNOWN_EMPTY].filter(Boolean).join(" ");
}

function describe({ share, end }) {
  if (share === 0) return "low precision";
  if (share === 1) return "FP16 at all steps";
  return `${percent(share)} FP16, ${end} noise`;
}

function percent(share) {
  return `${Math.round(share * 100)} %`;
}

function tickInterval(count) {
  return count <= 16 ? 1 : count <= 40 ? 5 : 10;
}

function make(tag, className, properties = {}) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  const { role, ...rest } = properties;
  if (role) element.setAttribute("role", role);
  return Object.assign(element, rest);
}
