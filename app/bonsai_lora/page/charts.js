// Charts: tables with coloured cells, and uPlot's lines.

import uPlot from "./uplot/uPlot.esm.js";
import { h } from "./dom.js";
import { short } from "./format.js";

const HEIGHT = 260;
const SECONDS = [1, 2, 5, 10, 15, 30, 60, 120, 300];

const clock = (_, times) => times.map((time) => new Date(time * 1000).toLocaleTimeString("en-GB"));

/**
 * Return a table whose cells are coloured by their numbers. `value(row, column)` is a number or
 * null; `low` and `high` are the ends of the scale, and `choose` is called with a cell's place.
 */
export function heatTable(caption, rows, columns, value, { low, high, corner, choose }) {
  const shade = (number) => (high > low ? Math.min(1, Math.max(0, (number - low) / (high - low))) : 0);
  const cell = (one, column) => {
    const number = value(one, column);
    if (number === null || number === undefined) return h("td", { class: "empty" }, "–");
    const made = h("td", { class: "heat", title: `${one}, ${column}: ${number}` }, short(number));
    made.style.setProperty("--heat", shade(number).toFixed(3));
    if (choose) made.addEventListener("click", () => choose(one, column));
    return made;
  };
  return h(
    "div",
    { class: "scroll", tabindex: 0, role: "region", "aria-label": caption },
    h(
      "table",
      { class: choose ? "heats chooses" : "heats" },
      h("caption", null, caption),
      h("thead", null, h("tr", null, h("td", null, corner ?? ""), columns.map((one) => h("th", { scope: "col" }, one)))),
      h("tbody", null, rows.map((one) => h("tr", null, h("th", { scope: "row" }, one), columns.map((column) => cell(one, column))))),
    ),
  );
}

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

/**
 * Draw lines into `place`. `series` is a list of `{label, values}` over `x`; null values are gaps.
 * The x axis has `steps`, or else times in seconds; the y axis ends at `least` or above.
 * Returns a function that draws new data. The picture is hidden from screen readers: `summary`
 * says what it shows, and a table beside it has the numbers.
 */
export function lineChart(place, summary, { xLabel, steps, logarithmic = false, format = short, least = 1 }) {
  const box = h("div", { class: "chart", role: "img", "aria-label": summary });
  const legend = h("ul", { class: "legend", "aria-hidden": "true" });
  place.replaceChildren(box, legend);
  let chart = null;
  let shown = "";
  const draw = (x, series) => {
    const labels = series.map((one) => one.label).join("\n");
    const data = [x, ...series.map((one) => one.values)];
    if (chart && labels === shown) {
      chart.setData(data);
      return;
    }
    shown = labels;
    chart?.destroy();
    chart = new uPlot(options(box, series, { xLabel, steps, logarithmic, format, least }), data, box);
    legend.replaceChildren(
      ...series.map((one, at) => {
        const item = h("li", null, one.label);
        item.style.setProperty("--line", colour(`--line-${at % 6}`));
        return item;
      }),
    );
  };
  const observer = new ResizeObserver(() => {
    if (!box.isConnected) observer.disconnect();
    else chart?.setSize({ width: box.clientWidth, height: HEIGHT });
  });
  observer.observe(box);
  return draw;
}

function options(box, series, { xLabel, steps, logarithmic, format, least }) {
  const axis = { stroke: colour("--text"), grid: { stroke: colour("--faint") }, ticks: { stroke: colour("--faint") } };
  return {
    width: Math.max(240, box.clientWidth),
    height: HEIGHT,
    legend: { show: false },
    cursor: { show: false },
    scales: { x: { time: !steps }, y: logarithmic ? { distr: 3 } : { range: (_, low, high) => [0, Math.max(high, low, least) * 1.1] } },
    axes: [
      steps ? { ...axis, label: xLabel, incrs: steps } : { ...axis, label: xLabel, incrs: SECONDS, space: 90, values: clock },
      { ...axis, size: 70, values: (_, ticks) => ticks.map((one) => (one === null ? "" : format(one))) },
    ],
    series: [
      {},
      ...series.map((one, at) => ({
        label: one.label,
        stroke: colour(`--line-${at % 6}`),
        width: 2,
        dash: [[], [8, 4], [2, 3]][Math.floor(at / 6) % 3],
        points: { show: one.values.length < 40, size: 5 },
      })),
    ],
  };
}
