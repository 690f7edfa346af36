/** Gives each Sage3Attention node its slider strip. The value lives in the text widget fp16_blocks and nowhere else. */

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { fetchLayout, findModelFile, isConnected } from "./model_layout.js";
import { SliderStrip } from "./slider_strip.js";
import { applyPreset, readSlots, TextHistory, writeSlots } from "./strip_state.js";

const NODE = "Sage3Attention";
const TEXT_WIDGET = "fp16_blocks";
const STRIP_WIDGET = "fp16_strip";
const MIN_HEIGHT = 196; // of the style sheet, and the canvas's margin of 10 above and below
const MIN_WIDTH = 400;
const REFRESH_MS = 400;

class NodeStrip {
  constructor(node, textWidget) {
    this.node = node;
    this.textWidget = textWidget;
    this.layout = null; // {family, blocks, sensitivity?}
    this.note = "";
    this.modelFile = null;
    this.history = new TextHistory(this.text);
    this.strip = new SliderStrip({
      edit: (slots, gesture) => this.setText(writeSlots(slots, !this.layout), gesture),
      preset: (name, count) => this.applyPreset(name, count),
      undo: () => this.goBack(this.history.undo()),
      redo: () => this.goBack(this.history.redo()),
      commit: announceChange,
      passWheel,
    });
    this.show();
  }

  get text() {
    return String(this.textWidget.value ?? "");
  }

  setText(text, gesture = null) {
    this.history.record(text, gesture);
    this.writeText(text);
  }

  goBack(text) {
    this.writeText(text);
    announceChange();
  }

  writeText(text) {
    if (text !== this.text) {
      this.textWidget.value = text;
      this.node.setDirtyCanvas?.(true, false);
    }
    this.show();
  }

  applyPreset(name, count) {
    const { slots } = this.strip.content;
    this.setText(name === "none" ? "" : writeSlots(applyPreset(slots, name, count), !this.layout));
    announceChange();
  }

  /** What ran knows its blocks better than the file does. */
  takeReport(report) {
    if (!report?.blocks?.length) return;
    this.layout = report;
    this.modelFile = findModelFile(this.node);
    this.show();
  }

  /** Another text or another model may have come in ways that tell nobody. */
  refresh() {
    const file = findModelFile(this.node);
    if (file !== this.modelFile) this.askForLayout(file);
    const state = this.stateKey();
    if (state === this.shownState) return;
    this.history.record(this.text);
    this.show();
  }

  async askForLayout(file) {
    this.modelFile = file;
    this.layout = null;
    this.note = "";
    if (file !== null) {
      const answer = await fetchLayout((path) => api.fetchApi(path), file);
      if (file !== this.modelFile || this.layout) return; // another model, or a run, came in between
      if (answer.blocks) this.layout = answer;
      else this.note = answer.error ?? "";
    }
    this.show();
  }

  stateKey() {
    return `${isConnected(this.node.inputs, TEXT_WIDGET)} ${this.text}`;
  }

  show() {
    this.shownState = this.stateKey();
    const blocks = this.layout?.blocks ?? null;
    this.strip.show({
      ...readSlots(this.text, blocks),
      blocks,
      family: this.layout?.family ?? "",
      sensitivity: this.layout?.sensitivity ?? null,
      linked: isConnected(this.node.inputs, TEXT_WIDGET),
      canUndo: this.history.past.length > 0,
      canRedo: this.history.future.length > 0,
      note: this.note,
    });
  }
}

function attachStrip(node) {
  const textWidget = node.widgets?.find(({ name }) => name === TEXT_WIDGET);
  if (!textWidget || !node.addDOMWidget) return;
  const strip = new NodeStrip(node, textWidget);
  // Last of the widgets: a widget that isn't saved would shift the saved values of those behind it.
  const widget = node.addDOMWidget(STRIP_WIDGET, STRIP_WIDGET, strip.strip.element, {
    serialize: false, // not into the prompt
    hideOnZoom: true,
    getMinHeight: () => MIN_HEIGHT,
  });
  widget.serialize = false; // not into the workflow
  chain(textWidget, "callback", () => strip.refresh());
  chain(node, "onConfigure", () => {
    strip.history.reset(strip.text);
    strip.refresh();
  });
  chain(node, "onConnectionsChange", () => strip.refresh());
  chain(node, "onExecuted", (message) => strip.takeReport(message?.sage3?.[0]));
  // No event tells that a loader further up took another file, in neither rendering.
  let timer = 0;
  chain(node, "onAdded", () => {
    clearInterval(timer);
    timer = setInterval(() => strip.refresh(), REFRESH_MS);
  });
  chain(node, "onRemoved", () => clearInterval(timer));
  const [width, height] = node.computeSize();
  node.setSize([Math.max(node.size[0], width, MIN_WIDTH), Math.max(node.size[1], height)]);
}

function chain(object, name, action) {
  const previous = object[name];
  object[name] = function (...values) {
    const result = previous?.apply(this, values);
    action(...values);
    return result;
  };
}

/** Let ComfyUI put the change into its own undo history and mark the workflow as modified. */
function announceChange() {
  app.canvas?.emitBeforeChange?.();
  app.canvas?.emitAfterChange?.();
}

/** Nodes 2.0 takes the bubbling event itself; elsewhere the canvas lies beside the widgets and never sees it. */
function passWheel(event) {
  if (!globalThis.LiteGraph?.vueNodesMode) app.canvas?.processMouseWheel?.(event);
}

const style = document.createElement("link");
style.rel = "stylesheet";
style.href = new URL("./slider_strip.css", import.meta.url).href;
document.head.append(style);

app.registerExtension({
  name: "sage3.sliderStrip",
  nodeCreated(node) {
    if (node.comfyClass === NODE) attachStrip(node);
  },
});
