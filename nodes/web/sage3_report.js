// Shows the text that Sage3Calibrate, Sage3Doctor and Sage3Compare give, on the node itself, with a button that copies it.
import { app } from "../../scripts/app.js";
import { ComfyWidgets } from "../../scripts/widgets.js";

const NODES = ["Sage3Calibrate", "Sage3Doctor", "Sage3Compare"];
const TEXT = "report_text";

function reportWidget(node) {
  const present = node.widgets?.find((widget) => widget.name === TEXT);
  if (present) return present;
  const { widget } = ComfyWidgets.STRING(node, TEXT, ["STRING", { multiline: true }], app);
  // Of this run, not of the workflow: not saved, and not sent to the server.
  widget.serialize = false;
  widget.options.serialize = false;
  const element = widget.inputEl ?? widget.element;
  if (element) element.readOnly = true;
  const button = node.addWidget("button", "Copy report", null, () => copy(widget.value, element));
  button.serialize = button.options.serialize = false;
  return widget;
}

async function copy(text, element) {
  try {
    await navigator.clipboard.writeText(text); // only offered to pages served over https or from this machine
  } catch {
    element?.select();
  }
}

app.registerExtension({
  name: "sage3.report",
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (!NODES.includes(nodeData.name)) return;
    const onExecuted = nodeType.prototype.onExecuted;
    nodeType.prototype.onExecuted = function (message) {
      onExecuted?.apply(this, arguments);
      if (message?.text) reportWidget(this).value = [message.text].flat().join("\n");
    };
  },
});
