/** Colours of a block's sensitivity: from calm blue over sand to red, also told apart by the colour-blind. */

const STOPS = [
  [74, 148, 184],
  [222, 186, 104],
  [222, 88, 72],
];

/**
 * @param {number} heat 0 (harmless) to 1 (the most sensitive)
 * @returns {string} a CSS colour
 */
export function heatColour(heat) {
  const place = Math.min(Math.max(heat, 0), 1) * (STOPS.length - 1);
  const below = Math.min(Math.floor(place), STOPS.length - 2);
  const channels = STOPS[below].map((value, channel) => {
    return Math.round(value + (place - below) * (STOPS[below + 1][channel] - value));
  });
  return `rgb(${channels.join(" ")})`;
}

export const HEAT_GRADIENT = `linear-gradient(to right, ${STOPS.map((stop) => `rgb(${stop.join(" ")})`).join(", ")})`;
