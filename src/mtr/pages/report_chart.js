/* One chart of `mtr report`: scales, ticks, lines, and the read-out at a place of the x axis. */

const SVG = "http://www.w3.org/2000/svg";
const DASHES = ["", "7 4", "2 3", "9 3 2 3"];

function draw(tag, attributes, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

// --- numbers in words ---------------------------------------------------------------------------------------------

function trimmed(value, digits) {
  const text = value.toPrecision(digits);
  return text.includes("e") ? String(Number(text)) : text.includes(".") ? text.replace(/\.?0+$/, "") : text;
}

/** Short: 0.5, 3,000, 12 k. */
function plain(value) {
  const size = Math.abs(value);
  if (size === 0) return "0";
  for (const [limit, unit] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e4, "k"]]) {
    if (size >= limit) return `${trimmed(value / (unit === "k" ? 1e3 : limit), 3)} ${unit}`;
  }
  if (size < 1e-3) return value.toExponential(2).replace(/\.?0+e/, "e").replace("e-", "e−");
  return size >= 1000 ? Math.round(value).toLocaleString("en") : trimmed(value, 3);
}

/** With four digits, where that is no integer. */
function exact(value) {
  const size = Math.abs(value);
  if (size >= 1e7) return plain(value);
  if (size >= 1000) return Math.round(value).toLocaleString("en");
  if (size === 0) return "0";
  return size < 1e-3 ? value.toExponential(2).replace("e-", "e−") : value.toPrecision(4);
}

function duration(seconds) {
  if (seconds < 60) return `${trimmed(seconds, 3)} s`;
  if (seconds < 3600) return `${trimmed(seconds / 60, 3)} min`;
  return seconds < 172800 ? `${trimmed(seconds / 3600, 3)} h` : `${trimmed(seconds / 86400, 3)} d`;
}

/* By kind of a chart: how ticks and values are written, and the unit in which ticks are round. */
const KINDS = {
  number: { tick: plain, value: exact, unit: 1 },
  percent: { tick: (value) => `${trimmed(value * 100, 3)}%`, value: (value) => `${(value * 100).toFixed(1)}%`, unit: 0.01 },
  bytes: {
    tick: (value) => `${trimmed(value / 2 ** 30, 3)} GiB`, value: (value) => `${(value / 2 ** 30).toFixed(2)} GiB`, unit: 2 ** 30,
  },
};
const X_WORDS = { step: (value) => Math.round(value).toLocaleString("en"), tokens: plain, seconds: duration };
const X_LABELS = { step: "step", tokens: "tokens", seconds: "time" };
const X_UNITS = { step: " steps", tokens: " tokens", seconds: "" };

// --- scales -------------------------------------------------------------------------------------------------------

/** Round numbers from low to high, about `count` of them. */
function niceTicks(low, high, count) {
  const rough = (high - low) / Math.max(count, 1) || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const unit = [1, 2, 2.5, 5, 10].find((factor) => factor * power >= rough * 0.999) * power;
  const ticks = [];
  for (let i = Math.ceil(low / unit - 1e-9); i * unit <= high + unit * 1e-9; i++) ticks.push(i * unit + 0);
  return ticks;
}

/** Ticks of time: round in the unit that is written. */
function timeTicks(high, count) {
  const unit = high < 60 ? 1 : high < 3600 ? 60 : high < 172800 ? 3600 : 86400;
  return niceTicks(0, high / unit, count).map((value) => value * unit);
}

function logTicks(low, high) {
  const ticks = [];
  const decades = Math.log10(high / low);
  const factors = decades < 1.2 ? [1, 1.5, 2, 3, 4, 5, 7] : decades < 2.5 ? [1, 2, 5] : [1];
  const every = decades > 6 ? 2 : 1;
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power += every) {
    for (const factor of factors) {
      const tick = factor * 10 ** power;
      if (tick >= low * 0.999 && tick <= high * 1.001) ticks.push(tick);
    }
  }
  return ticks.length >= 2 ? ticks : niceTicks(low, high, 4);
}

/** From values to pixels. */
function scale(low, high, start, end, isLog) {
  const convert = isLog ? Math.log : (value) => value;
  const from = convert(low);
  const span = convert(high) - from || 1;
  return (value) => start + ((convert(value) - from) / span) * (end - start);
}

/** y at x on the line through the points (xs, ys); xs grow. */
function interpolate(xs, ys, x) {
  if (!xs.length) return x;
  let [low, high] = [0, xs.length - 1];
  if (x <= xs[0]) return xs[0] > 0 ? (ys[0] * x) / xs[0] : ys[0];
  if (x >= xs[high]) return ys[high];
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (xs[middle] <= x) low = middle; else high = middle;
  }
  return ys[low] + ((ys[high] - ys[low]) * (x - xs[low])) / (xs[high] - xs[low] || 1);
}

function nearest(xs, x) {
  let [low, high] = [0, xs.length - 1];
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (xs[middle] <= x) low = middle; else high = middle;
  }
  return Math.abs(xs[high] - x) < Math.abs(xs[low] - x) ? high : low;
}

/** Mean with weights weight^distance over as many points before as after, so that the curve neither lags nor bends. */
function smoothed(values, weight) {
  const most = Math.ceil(Math.log(0.02) / Math.log(weight));
  return values.map((value, i) => {
    let [sum, weights, factor] = [value, 1, 1];
    for (let d = 1; d <= Math.min(most, i, values.length - 1 - i); d++) {
      factor *= weight;
      sum += factor * (values[i - d] + values[i + d]);
      weights += 2 * factor;
    }
    return sum / weights;
  });
}

// --- the chart ----------------------------------------------------------------------------------------------------

class Chart {
  /** spec: {key, title, kind, log, zero, smooth, points}; view: what all charts share (report.js). */
  constructor(spec, runs, view) {
    Object.assign(this, { spec, view });
    this.lines = runs.map((run, index) => ({ run, index, series: run.series[spec.key] })).filter((line) => line.series);
    this.kind = KINDS[spec.kind || "number"];
    this.isLog = Boolean(spec.log) && this.hasSpikes();
    this.readout = make("ul", { class: "readout" });
    this.host = make("div", {
      class: "plot", role: "slider", tabindex: 0, "aria-label": `${spec.title}: read values along the axis`,
      "aria-orientation": "horizontal", "aria-valuemin": 0, "aria-valuemax": 0, "aria-valuenow": 0, "aria-valuetext": "-",
    });
    this.element = make("figure", { class: `card chart${spec.wide ? " wide" : ""}${spec.alone ? " alone" : ""}`, "data-key": spec.key },
      make("figcaption", {}, make("h3", {}, spec.title), spec.log ? this.logButton() : null,
        spec.help ? make("p", { class: "muted" }, spec.help) : null),
      this.readout, this.host, this.table());
    this.listen();
  }

  /** Whether rare high values would press all others to the foot of a linear scale. */
  hasSpikes() {
    return this.lines.some(({ series }) => {
      const sorted = [...series.value].sort((a, b) => a - b);
      const highest = (series.high || series.value).reduce((a, b) => Math.max(a, b), 0);
      return sorted[0] > 0 && highest > 25 * sorted[sorted.length >> 1];
    });
  }

  logButton() {
    const button = make("button", { type: "button", class: "quiet log", "aria-pressed": String(this.isLog),
      "aria-label": `${this.spec.title}: logarithmic scale`, onclick: () => {
        this.isLog = !this.isLog;
        button.setAttribute("aria-pressed", String(this.isLog));
        this.render();
      } }, "log");
    return button;
  }

  /** First, last, lowest and highest values: the chart as text. */
  table() {
    const head = ["run", "first", "last", "lowest", "highest"].map((name) => make("th", { scope: "col" }, name));
    const rows = this.lines.map(({ run, series }) => {
      const { step, value: all } = series;
      const point = (isBetter) => {
        const place = all.reduce((best, value, i) => (isBetter(value, all[best]) ? i : best), 0);
        return [step[place], all[place]];
      };
      const lowest = series.lowest || point((a, b) => a < b);
      const highest = series.highest || point((a, b) => a > b);
      const at = ([place, value]) => `${this.kind.value(value)} at ${X_WORDS.step(place)}`;
      const [first, last] = [series.first?.[1] ?? all[0], series.last?.[1] ?? all.at(-1)];
      return make("tr", {}, make("th", { scope: "row" }, run.name),
        make("td", {}, this.kind.value(first)), make("td", {}, this.kind.value(last)),
        make("td", {}, at(lowest)), make("td", {}, at(highest)));
    });
    return make("details", { class: "numbers" }, make("summary", {}, "Numbers"),
      make("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": `${this.spec.title} in numbers` },
        make("table", {}, make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...rows))));
  }

  listen() {
    const at = (event) => {
      const box = this.host.getBoundingClientRect();
      return this.fromPixel(event.clientX - box.left);
    };
    this.host.addEventListener("pointermove", (event) => this.view.read(at(event)));
    this.host.addEventListener("pointerdown", (event) => this.view.read(at(event)));
    this.host.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && this.view.read(null));
    this.host.addEventListener("keydown", (event) => this.key(event));
    this.host.addEventListener("focus", () => this.view.cursor === null && this.host.matches(":focus-visible")
      && this.view.read(this.stops().at(-1)));
  }

  /** Every x at which a visible run has a value. */
  stops() {
    const all = this.visible().flatMap((line) => this.xs(line));
    return [...new Set(all)].sort((a, b) => a - b);
  }

  key(event) {
    const stops = this.stops();
    const now = this.view.cursor === null ? stops.length - 1 : nearest(stops, this.view.cursor);
    const page = Math.max(1, Math.round(stops.length / 10));
    const moves = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1, PageDown: -page, PageUp: page };
    let next = null;
    if (event.key in moves) next = now + moves[event.key];
    else if (event.key === "Home") next = 0;
    else if (event.key === "End") next = stops.length - 1;
    else if (event.key === "Escape") this.view.read(null);
    else return;
    event.preventDefault();
    if (next !== null) this.view.read(stops[Math.min(stops.length - 1, Math.max(0, next))]);
  }

  visible() {
    return this.lines.filter((line) => !this.view.hidden.has(line.index));
  }

  /** The places of a run's points on the axis that is chosen. */
  xs(line) {
    if (this.view.x === "step") return line.series.step;
    const axis = line.run.axis;
    line.cache ||= {};
    line.cache[this.view.x] ||= line.series.step.map((step) => interpolate(axis.step, axis[this.view.x], step));
    return line.cache[this.view.x];
  }

  /** The lines that are drawn, and the bounds of what is drawn. */
  measure() {
    const weight = this.spec.smooth ? this.view.smoothing : 0;
    const drawn = this.visible().map((line) => ({
      ...line, xs: this.xs(line), smooth: weight ? smoothed(line.series.value, weight) : line.series.value,
      isSmooth: weight > 0 && line.series.value.length > 2,
    }));
    const values = drawn.flatMap(({ series }) => [...(series.low || series.value), ...(series.high || [])]);
    const known = this.isLog ? values.filter((value) => value > 0) : values;
    let low = known.reduce((a, b) => Math.min(a, b), Infinity);
    let high = known.reduce((a, b) => Math.max(a, b), -Infinity);
    if (low === Infinity) [low, high] = [0.1, 1];
    if (this.isLog) return { drawn, low: low / (high > low ? 1 : 2), high: high * (high > low ? 1.05 : 2) };
    const pad = (high - low) * 0.06 || Math.abs(high) * 0.1 || 1;
    if (this.spec.zero || (low >= 0 && low < (high - low) * 0.4)) return { drawn, low: 0, high: high + pad };
    return { drawn, low: low - pad, high: high + pad };
  }

  render() {
    const width = Math.max(220, this.host.clientWidth || 320);
    const height = this.spec.wide ? 230 : 168;
    const { drawn, low, high } = this.measure();
    const { unit } = this.kind;
    const round = niceTicks(low / unit, high / unit, height / 38).map((tick) => tick * unit);
    const ticks = this.isLog ? logTicks(low, high) : round;
    const labels = ticks.map((tick) => this.kind.tick(tick));
    const left = 10 + 6.6 * Math.max(...labels.map((label) => label.length), 2);
    const box = { left, right: width - 10, top: 8, bottom: height - 24 };
    const most = Math.max(...drawn.map((line) => line.xs.at(-1)), 1);
    const x = scale(0, most, box.left, box.right, false);
    const y = scale(low, high, box.bottom, box.top, this.isLog);
    this.fromPixel = (pixel) => Math.max(0, Math.min(most, ((pixel - box.left) / (box.right - box.left)) * most));
    Object.assign(this, { box, drawn, scaleX: x, scaleY: y, most });
    const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, width, height, "aria-hidden": "true" });
    svg.append(this.axes(box, ticks, labels, x, y, most, width), ...drawn.map((line) => this.line(line, x, y)));
    svg.append(...drawn.map((line) => this.marks(line, x, box)));
    this.cursorGroup = draw("g", { class: "cursor" });
    svg.append(this.cursorGroup);
    this.host.replaceChildren(svg);
    this.read();
  }

  axes(box, ticks, labels, x, y, most, width) {
    const group = draw("g", { class: "axes" });
    ticks.forEach((tick, i) => {
      const at = y(tick);
      group.append(draw("line", { x1: box.left, x2: box.right, y1: at, y2: at }));
      group.append(draw("text", { x: box.left - 6, y: at + 4, "text-anchor": "end" }, labels[i]));
    });
    const count = Math.max(2, (box.right - box.left) / 90);
    const places = this.view.x === "seconds" ? timeTicks(most, count) : niceTicks(0, most, count);
    for (const place of places) {
      if (this.view.x === "step" && place % 1) continue;
      const at = x(place);
      const anchor = at > width - 40 ? "end" : "middle";
      group.append(draw("line", { x1: at, x2: at, y1: box.bottom, y2: box.bottom + 4, class: "tick" }));
      group.append(draw("text", { x: anchor === "end" ? box.right : at, y: box.bottom + 17, "text-anchor": anchor },
        X_WORDS[this.view.x](place) + (this.spec.wide && place === places.at(-1) ? X_UNITS[this.view.x] : "")));
    }
    group.append(draw("line", { x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom, class: "base" }));
    return group;
  }

  line({ index, series, xs, smooth, isSmooth }, x, y) {
    const inside = (value) => (this.isLog && value <= 0 ? null : y(value));
    const path = (values) => {
      let text = "";
      let pen = "M";
      values.forEach((value, i) => {
        const at = inside(value);
        if (at === null) { pen = "M"; return; }
        text += `${pen}${x(xs[i]).toFixed(1)} ${at.toFixed(1)}`;
        pen = "L";
      });
      return text;
    };
    const group = draw("g", { class: `run-${index % 5}` });
    if (series.low && !(this.isLog && series.low.some((value) => value <= 0))) {
      const back = xs.map((at, i) => `L${x(at).toFixed(1)} ${y(series.low[i]).toFixed(1)}`).reverse().join("");
      group.append(draw("path", { class: "band", d: `${path(series.high)}${back}Z` }));
    } else if (isSmooth) group.append(draw("path", { class: "raw", d: path(series.value) }));
    const dashes = DASHES[index % DASHES.length];
    group.append(draw("path", { class: "line", d: path(smooth), "stroke-dasharray": dashes || "none" }));
    if (this.spec.points && xs.length <= 60) {
      xs.forEach((at, i) => inside(series.value[i]) !== null
        && group.append(draw("circle", { cx: x(at), cy: y(series.value[i]), r: 3 })));
    }
    return group;
  }

  /** Crosses at the foot: steps that made no update. */
  marks({ run, index }, x, box) {
    const group = draw("g", { class: "skipped" });
    if (this.spec.key !== "loss") return group;
    for (const [step] of run.skipped) {
      const at = x(this.view.x === "step" ? step : interpolate(run.axis.step, run.axis[this.view.x], step));
      const y = box.bottom - 6 - 9 * (index % 5);
      group.append(draw("path", { d: `M${at - 3} ${y - 3}l6 6M${at + 3} ${y - 3}l-6 6` }));
    }
    return group;
  }

  /** What is at the cursor, or at the end of each line. */
  read() {
    const cursor = this.view.cursor;
    const items = this.drawn.map((line) => {
      const i = cursor === null ? line.xs.length - 1 : nearest(line.xs, cursor);
      const { value, low, high, last } = line.series;
      if (cursor === null && last) {  // not the mean of the last bucket
        const text = this.kind.value(last[1]);
        return { ...line, i, at: line.xs[i], short: text, text };
      }
      const range = low && low[i] < high[i] ? ` (${this.kind.value(low[i])} to ${this.kind.value(high[i])})` : "";
      return { ...line, i, at: line.xs[i], short: this.kind.value(value[i]), text: `${this.kind.value(value[i])}${range}` };
    });
    const place = items.length ? items.reduce((far, item) => (item.at > far ? item.at : far), 0) : 0;
    const isOne = items.every((item) => item.at === place);
    const where = `${X_LABELS[this.view.x]} ${X_WORDS[this.view.x](cursor === null || isOne ? place : cursor)}`;
    this.readout.replaceChildren(...items.map((item) => make("li", { class: `run-${item.index % 5}`, title: item.run.name }, swatch(item.index),
        make("span", { class: this.spec.wide && this.view.several ? "name" : "sr" }, item.run.name),
        this.spec.wide ? item.text : item.short)));
    this.host.setAttribute("aria-valuemax", String(Number(this.most.toPrecision(6))));
    this.host.setAttribute("aria-valuenow", String(Number((cursor ?? place).toPrecision(6))));
    this.host.setAttribute("aria-valuetext", `${where}: ${items.map((item) => `${item.run.name} ${item.text}`).join(", ")}`);
    this.cursorGroup.replaceChildren();
    if (cursor === null) return;
    const at = this.scaleX(Math.min(isOne && items.length ? place : cursor, this.most));
    const label = X_WORDS[this.view.x](isOne ? place : cursor);
    const half = 7 + 3.4 * label.length;
    const middle = Math.min(Math.max(at, half), this.box.right + 10 - half);
    this.cursorGroup.append(draw("line", { x1: at, x2: at, y1: this.box.top, y2: this.box.bottom }),
      draw("rect", { x: middle - half, y: this.box.bottom + 4, width: 2 * half, height: 18, rx: 4 }),
      draw("text", { x: middle, y: this.box.bottom + 17, "text-anchor": "middle" }, label));
    for (const item of items) {
      if (this.isLog && item.series.value[item.i] <= 0) continue;
      this.cursorGroup.append(draw("circle", { class: `run-${item.index % 5}`, cx: this.scaleX(item.at),
        cy: this.scaleY(item.series.value[item.i]), r: 4 }));
    }
  }
}

/** A short piece of a run's line. */
function swatch(index) {
  return draw("svg", { class: `swatch run-${index % 5}`, viewBox: "0 0 26 8", width: 26, height: 8, "aria-hidden": "true" },
    draw("line", { x1: 0, x2: 26, y1: 4, y2: 4, "stroke-dasharray": DASHES[index % DASHES.length] || "none" }));
}
