/** Pointer, wheel and keyboard on a SliderStrip. */

import { paintEnd, paintShares, setShare } from "./strip_state.js";

const SNAP = 0.05; // of a drag
const FINE = 0.01;
const ARROW = 0.05;
const PAGE = 0.25;

export class StripGestures {
  #strip;
  #drag = null;
  #dragCount = 0;

  /** @param {import("./slider_strip.js").SliderStrip} strip */
  constructor(strip) {
    this.#strip = strip;
    const { element, plot } = strip;
    plot.addEventListener("pointerdown", (event) => this.#press(event));
    plot.addEventListener("mousedown", (event) => event.preventDefault()); // else it takes the focus from the slider
    plot.addEventListener("pointermove", (event) => this.#move(event));
    plot.addEventListener("pointerup", () => this.#release());
    plot.addEventListener("pointercancel", () => this.#release());
    plot.addEventListener("pointerleave", () => !this.#drag && strip.showReadout());
    plot.addEventListener("dblclick", (event) => this.#doubleClick(event));
    plot.addEventListener("wheel", (event) => this.#wheel(event), { passive: false });
    element.addEventListener("keydown", (event) => this.#key(event));
  }

  #press(event) {
    const strip = this.#strip;
    if (event.button !== 0 || !strip.sliders.length) return;
    event.stopPropagation(); // else Nodes 2.0 drags the node
    const point = this.#point(event);
    strip.focus(point.slot);
    if (!strip.editable) return;
    strip.plot.setPointerCapture(event.pointerId);
    const { slots } = strip.content;
    const end = event.shiftKey || point.onMark ? otherEnd(slots[point.slot].end) : null;
    this.#drag = { from: point, end, gesture: `drag ${++this.#dragCount}` };
    this.#paint(point);
  }

  #move(event) {
    if (!this.#strip.sliders.length) return;
    const point = this.#point(event);
    if (this.#drag) {
      event.stopPropagation();
      this.#paint(point);
    }
    this.#strip.showReadout(point.slot);
  }

  #paint(point) {
    const { from, end, gesture } = this.#drag;
    const { slots } = this.#strip.content;
    const painted = end === null ? paintShares(slots, from, point) : paintEnd(slots, from.slot, point.slot, end);
    this.#drag.from = point;
    this.#edit(painted, gesture, point.slot);
  }

  #release() {
    if (!this.#drag) return;
    this.#drag = null;
    this.#strip.actions.commit();
  }

  #doubleClick(event) {
    event.stopPropagation();
    const strip = this.#strip;
    if (!strip.editable || !strip.sliders.length || event.shiftKey) return;
    const { slot, onMark } = this.#point(event);
    if (onMark) return; // two clicks on the mark are two toggles
    this.#edit(setShare(strip.content.slots, slot, 0), null, slot);
    strip.actions.commit();
  }

  #wheel(event) {
    const strip = this.#strip;
    // A mere scroll over the node stays the canvas's: only a strip that was clicked takes it.
    const isOurs = strip.element.contains(document.activeElement) && !event.ctrlKey && !event.metaKey;
    if (!isOurs || !strip.editable || !strip.sliders.length) return strip.actions.passWheel(event);
    event.preventDefault();
    event.stopPropagation();
    const { slot } = this.#point(event);
    // Shift turns a wheel sideways in some browsers.
    const direction = -Math.sign(event.deltaY || event.deltaX);
    const share = strip.content.slots[slot].share + direction * FINE;
    this.#edit(setShare(strip.content.slots, slot, share), `wheel ${slot}`, slot);
    strip.actions.commit();
  }

  #key(event) {
    const strip = this.#strip;
    if (event.ctrlKey || event.metaKey) {
      const key = event.key.toLowerCase();
      if (key !== "z" && key !== "y") return;
      consume(event);
      if (key === "z" && !event.shiftKey) strip.actions.undo();
      else strip.actions.redo();
      return;
    }
    if (event.altKey || event.target.type !== "range") return;
    const last = strip.sliders.length - 1;
    const slot = strip.active;
    const moves = { ArrowLeft: slot - 1, ArrowRight: slot + 1, Home: 0, End: last };
    if (event.key in moves) {
      consume(event);
      strip.focus(Math.min(Math.max(moves[event.key], 0), last));
      return;
    }
    if (!strip.editable) return;
    const edited = this.#editByKey(event, slot);
    if (!edited) return;
    consume(event);
    this.#edit(edited, `key ${event.key} ${slot}`, slot);
    strip.actions.commit();
  }

  #editByKey({ key, shiftKey }, slot) {
    const { slots } = this.#strip.content;
    const arrow = shiftKey ? FINE : ARROW;
    const steps = { ArrowUp: arrow, ArrowDown: -arrow, PageUp: PAGE, PageDown: -PAGE, Delete: -1, Backspace: -1 };
    if (key in steps) return setShare(slots, slot, slots[slot].share + steps[key]);
    if (key.toLowerCase() === "l") return paintEnd(slots, slot, slot, otherEnd(slots[slot].end));
    return null;
  }

  #edit(slots, gesture, position) {
    this.#strip.actions.edit(slots, gesture);
    this.#strip.showReadout(position);
  }

  /** The nearest slot under the pointer, the share at its height, and whether it is below the sliders. */
  #point({ clientX, clientY }) {
    const { sliders } = this.#strip;
    const distance = ({ element }) => {
      const { left, right } = element.getBoundingClientRect();
      return Math.max(left - clientX, clientX - right, 0);
    };
    const distances = sliders.map(distance);
    const slot = distances.indexOf(Math.min(...distances));
    const { top, bottom, height } = sliders[slot].track.getBoundingClientRect();
    const share = Math.min(Math.max((bottom - clientY) / height, 0), 1);
    return { slot, share: Math.round(share / SNAP) * SNAP, onMark: clientY > bottom + 0.02 * (bottom - top) };
  }
}

function otherEnd(end) {
  return end === "high" ? "low" : "high";
}

function consume(event) {
  event.preventDefault();
  event.stopPropagation(); // else ComfyUI takes it: Delete would remove the node
}
