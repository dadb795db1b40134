// The live plot of lab.monitor(): CPU, memory, throttling and processes of a few targets, drawn on one canvas.
// Plain JavaScript for anywidget, no build step. The kernel pushes; nothing here waits for it: pause, window and
// crosshair work while a cell runs, and when the kernel goes away the last picture stays and says so.
// @ts-check

/**
 * One target. Columns of equal length; NaN is a gap.
 * @typedef {{ t: number[], cpu: number[], mem: number[], thr: number[], pids: number[] }} Columns
 * @typedef {{ name: string, kind: string, cpu: number | null, mem: number | null, can: string[] }} Target
 * @typedef {{ s: number, t: number, kind: string, text: string }} Mark
 * @typedef {{ targets: Target[], data: Columns[], marks: Mark[], state: string, seen: number, seq: number, whole: boolean, note: string, listeners: Set<() => void> }} Store
 * @typedef {{ on: Function, off: Function, send: Function, get: (name: string) => any }} Model
 * Seconds on the axis, the crosshair's, and the target that stands out.
 * @typedef {{ from: number, to: number, at: number | null, chosen: number | null }} Look
 */

const FIELDS = 5; // t, cpu, mem, thr, pids: float64 t first, see frame() in monitor.py
const LIGHT = ["#0072B2", "#D55E00", "#008060", "#B3589A", "#9A6700", "#2B8CBE", "#333333", "#777777"];
const DARK = ["#56B4E9", "#FF9D5C", "#34D3A2", "#F0A3D0", "#F0E442", "#9AD0F5", "#DDDDDD", "#AAAAAA"];
const DASHES = [[], [7, 4], [2, 3], [9, 3, 2, 3]];
/** No two of the first 32 curves have both the same colour and the same dashes. @param {number} index */
const dashes = (index) => DASHES[(index + Math.floor(index / LIGHT.length)) % DASHES.length];
const MANY = 6; // curves beyond which they are drawn thinner, and a crosshair's figures stand in the legend
const WINDOWS = [15, 60, 300, 0];
const MIB = 1048576;

/** @type {{ key: "cpu" | "mem" | "thr" | "pids", title: string, unit: string, least: number, weight: number }[]} */
const PANELS = [
  { key: "cpu", title: "CPU", unit: "% of one core", least: 10, weight: 3 },
  { key: "mem", title: "Memory", unit: "MiB", least: 4, weight: 3 },
  { key: "thr", title: "Throttled", unit: "% of time, by the CPU limit", least: 10, weight: 1.7 },
  { key: "pids", title: "Processes", unit: "", least: 4, weight: 1.7 },
];

/** @returns {Columns} */
const columns = () => ({ t: [], cpu: [], mem: [], thr: [], pids: [] });

/**
 * Take a frame in: `full` replaces what was there, otherwise its points are appended.
 * @param {Store} store @param {any} message @param {DataView[]} buffers
 */
function receive(store, message, buffers) {
  if (message.kind === "note") {
    store.note = message.text;
    store.listeners.forEach((listener) => listener());
  }
  if (message.kind !== "frame") return;
  store.seen = performance.now();
  store.state = message.state;
  if (message.targets) store.targets = message.targets;
  // A full frame comes now and then, for pages that missed one; a page that missed none needs only its fresh end.
  store.whole = store.whole && store.seq === message.seq - 1;
  const behind = message.full && !store.whole;
  store.whole = store.whole || message.full;
  store.seq = message.seq;
  if (behind) store.data = store.targets.map(columns);
  if (message.full) store.marks = [];
  store.marks.push(...message.marks);
  const view = buffers[0];
  let at = 0;
  message.counts.forEach((/** @type {number} */ count, /** @type {number} */ index) => {
    const into = (store.data[index] ??= columns());
    const skipped = message.full && !behind ? count - message.fresh[index] : 0;
    at += skipped * FIELDS * 8;
    for (let i = skipped; i < count; i++, at += FIELDS * 8) {
      into.t.push(view.getFloat64(at, true));
      into.cpu.push(view.getFloat64(at + 8, true));
      into.mem.push(view.getFloat64(at + 16, true) / MIB);
      into.thr.push(view.getFloat64(at + 24, true));
      into.pids.push(view.getFloat64(at + 32, true));
    }
    const extra = into.t.length - message.capacity;
    if (extra > 200) for (const list of Object.values(into)) list.splice(0, extra);
  });
  store.listeners.forEach((listener) => listener());
}

/** @param {number} value @param {string} unit */
function say(value, unit) {
  if (!Number.isFinite(value)) return "–";
  const digits = value >= 100 || Number.isInteger(value) ? 0 : 1;
  return `${value.toFixed(digits)}${unit.startsWith("%") ? " %" : unit ? ` ${unit}` : ""}`;
}

/** A round step so that about `lines` of them reach `value`. @param {number} value @param {number} lines */
function roundStep(value, lines) {
  const power = 10 ** Math.floor(Math.log10(value / lines));
  return ([1, 2, 5].find((step) => step * power * lines >= value * 0.9999) ?? 10) * power;
}

/** The colours of the page, or without an element those of a picture that stays: light. @param {HTMLElement | null} element */
function theme(element) {
  const style = element && getComputedStyle(element);
  /** @param {string} name @param {string} other */
  const css = (name, other) => style?.getPropertyValue(name).trim() || other;
  const flag = element ? document.body.dataset.jpThemeLight : "true";
  const dark = flag ? flag === "false" : matchMedia("(prefers-color-scheme: dark)").matches;
  return {
    ink: css("--jp-ui-font-color1", dark ? "#e6e6e6" : "#1b1f24"),
    muted: css("--jp-ui-font-color2", dark ? "#a8a8a8" : "#57606a"),
    grid: css("--jp-border-color2", dark ? "#3d3d3d" : "#d8dee4"),
    font: css("--jp-ui-font-family", "system-ui, sans-serif"),
    paper: css("--jp-layout-color1", dark ? "#212121" : "#ffffff"),
    alarm: dark ? "#ff8a9a" : "#a40e36",
    palette: dark ? DARK : LIGHT,
    dark,
  };
}

/**
 * Everything on the canvas.
 * @param {HTMLCanvasElement} canvas @param {Store} store @param {Look} look
 */
function draw(canvas, store, look) {
  const width = canvas.clientWidth;
  const height = canvas.clientHeight;
  const scale = window.devicePixelRatio || 1;
  if (canvas.width !== Math.round(width * scale) || canvas.height !== Math.round(height * scale)) {
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round(height * scale);
  }
  const context = canvas.getContext("2d");
  if (!context || width < 50) return;
  const colours = theme(canvas);
  context.setTransform(scale, 0, 0, scale, 0, 0);
  context.clearRect(0, 0, width, height);
  for (const place of layout(width, height)) panel(context, store, look, colours, place);
}

/** Two columns where there is room, else one. @param {number} width @param {number} height */
function layout(width, height) {
  const gap = 10;
  const wide = width >= 700;
  /** @type {{ panel: typeof PANELS[0], x: number, y: number, w: number, h: number, axis: boolean }[]} */
  const places = [];
  const rows = wide ? [[PANELS[0], PANELS[1]], [PANELS[2], PANELS[3]]] : PANELS.map((one) => [one]);
  const total = rows.reduce((sum, row) => sum + row[0].weight, 0);
  let y = 0;
  rows.forEach((row, index) => {
    const h = ((height - gap * (rows.length - 1)) * row[0].weight) / total;
    const w = (width - gap * 2 * (row.length - 1)) / row.length;
    row.forEach((one, i) => places.push({ panel: one, x: i * (w + gap * 2), y, w, h, axis: index === rows.length - 1 }));
    y += h + gap;
  });
  return places;
}

/**
 * @param {CanvasRenderingContext2D} c @param {Store} store @param {Look} look
 * @param {ReturnType<typeof theme>} colours @param {ReturnType<typeof layout>[0]} place
 */
function panel(c, store, look, colours, place) {
  const { key, title, unit, least } = place.panel;
  const left = place.x + 40;
  const right = place.x + place.w - 6;
  const top = place.y + 20;
  const bottom = place.y + place.h - (place.axis ? 18 : 6);
  // A limit far above the curve would flatten it: then it is only named.
  /** @type {number[]} */
  const limits = key === "cpu" || key === "mem" ? store.targets.map((one, i) => (look.chosen ?? i) === i ? one[key] ?? NaN : NaN) : [];
  let high = least;
  store.data.forEach((data) =>
    data[key].forEach((value, i) => {
      if (data.t[i] >= look.from && data.t[i] <= look.to && value > high) high = value;
    }),
  );
  const far = store.targets.length > 1 ? 5 : 8;
  for (const limit of limits) if (limit < high * far && limit > high) high = limit;
  /** @param {number} t */
  const px = (t) => left + ((t - look.from) / (look.to - look.from)) * (right - left);
  // The words of what happened have a band of their own, above the curves and the limits.
  const named = key === "cpu" ? words(c, store, look, px, left, right, colours) : [];
  const band = named.length ? Math.max(...named.map((one) => one.row + 1)) * WORDS_HEIGHT + 2 : 0;
  high *= (1.04 * (bottom - top)) / (bottom - top - band);
  const step = Math.max(roundStep(high, bottom - top > 70 ? 5 : 3), key === "pids" ? 1 : 0);
  high = Math.ceil(high / step) * step;
  /** @param {number} value */
  const py = (value) => bottom - (value / high) * (bottom - top);

  c.lineWidth = 1;
  c.textBaseline = "middle";
  c.font = `600 12px ${colours.font}`;
  c.fillStyle = colours.ink;
  c.textAlign = "left";
  c.fillText(title, place.x + 2, place.y + 8);
  const titleWidth = c.measureText(title).width;
  c.font = `11px ${colours.font}`;
  c.fillStyle = colours.muted;
  c.fillText(unit, place.x + 9 + titleWidth, place.y + 8);

  c.textAlign = "right";
  for (let value = 0; value <= high * 1.0001; value += step) {
    const y = Math.round(py(value)) + 0.5;
    c.strokeStyle = colours.grid;
    c.beginPath();
    c.moveTo(left, y);
    c.lineTo(right, y);
    c.stroke();
    c.fillText(step >= 1 ? value.toFixed(0) : value.toFixed(1), left - 5, y);
  }
  axis(c, look, px, bottom, colours, place.axis);
  if (key === "thr" && store.data.length && store.data.every((data) => !data.thr.some(Number.isFinite))) {
    c.textAlign = "center";
    c.fillText(store.targets.some((one) => one.cpu) ? "nothing measured yet" : "no CPU limit that is told here", (left + right) / 2, (top + bottom) / 2);
  }

  c.save();
  c.beginPath();
  c.rect(left, top - 3, right - left, bottom - top + 5);
  c.clip();
  marks(c, store, look, px, top, bottom, colours);
  const order = store.data.map((_, index) => index).sort((a, b) => Number(a === look.chosen) - Number(b === look.chosen));
  for (const index of order) {
    c.strokeStyle = colours.palette[index % colours.palette.length];
    c.lineWidth = index === look.chosen ? 2.6 : store.data.length > MANY ? 1.2 : 1.8;
    c.globalAlpha = look.chosen === null || index === look.chosen ? 1 : 0.18;
    c.setLineDash(dashes(index));
    curve(c, store.data[index], key, look, px, py, bottom, store.data.length === 1);
  }
  c.globalAlpha = 1;
  c.setLineDash([]);
  c.restore();
  c.font = `600 10px ${colours.font}`;
  c.textAlign = "left";
  for (const one of named) halo(c, one.text, one.from, top + 6 + one.row * WORDS_HEIGHT, one.colour, colours);
  c.font = `11px ${colours.font}`;
  limitLines(c, limits, store, { left, right, top, high, py }, colours, unit);
  if (look.at !== null) crosshair(c, store, look.at, key, unit, { px, py, left, right, top, bottom }, colours, look.chosen);
}

/**
 * @param {CanvasRenderingContext2D} c @param {Columns} data @param {"cpu" | "mem" | "thr" | "pids"} key
 * @param {{ from: number, to: number }} look @param {(t: number) => number} px @param {(v: number) => number} py
 * @param {number} bottom @param {boolean} filled
 */
function curve(c, data, key, look, px, py, bottom, filled) {
  const values = data[key];
  let first = data.t.findIndex((t) => t >= look.from);
  if (first < 0) return;
  first = Math.max(0, first - 1);
  let begun = NaN;
  let lastX = NaN;
  const path = new Path2D();
  const area = new Path2D();
  const closeArea = () => {
    if (Number.isNaN(begun)) return;
    area.lineTo(lastX, bottom);
    area.lineTo(begun, bottom);
    area.closePath();
    begun = NaN;
  };
  for (let i = first; i < data.t.length && data.t[i] <= look.to + 1; i++) {
    if (!Number.isFinite(values[i])) {
      closeArea();
      continue;
    }
    const x = px(data.t[i]);
    const y = py(values[i]);
    if (Number.isNaN(begun)) {
      path.moveTo(x, y);
      area.moveTo(x, bottom);
      begun = x;
    } else {
      path.lineTo(x, y);
    }
    area.lineTo(x, y);
    lastX = x;
  }
  closeArea();
  if (filled) {
    c.globalAlpha = 0.14;
    c.fillStyle = c.strokeStyle;
    c.fill(area);
    c.globalAlpha = 1;
  }
  c.stroke(path);
}

/**
 * @param {CanvasRenderingContext2D} c @param {{ from: number, to: number }} look @param {(t: number) => number} px
 * @param {number} bottom @param {ReturnType<typeof theme>} colours @param {boolean} labels
 */
function axis(c, look, px, bottom, colours, labels) {
  const span = look.to - look.from;
  const room = Math.max(2, Math.floor((px(look.to) - px(look.from)) / 62));
  const each = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 1800, 3600].find((s) => span / s <= room) ?? 7200;
  c.fillStyle = colours.muted;
  c.textAlign = "center";
  for (let t = Math.ceil(look.from / each) * each; t <= look.to + 1e-6; t += each) {
    const x = Math.round(px(t)) + 0.5;
    c.strokeStyle = colours.grid;
    c.beginPath();
    c.moveTo(x, bottom);
    c.lineTo(x, bottom + 3);
    c.stroke();
    if (labels && x < px(look.to) - 8) c.fillText(t >= 120 ? `${Math.floor(t / 60)}:${String(t % 60).padStart(2, "0")}` : `${t} s`, x, bottom + 11);
  }
}

/**
 * What happened within what is looked at, to whom it is asked of, oldest first.
 * @param {Store} store @param {Look} look
 */
function seen(store, look) {
  const within = store.marks.filter((one) => one.t >= look.from && one.t <= look.to && (look.chosen ?? one.s) === one.s);
  return within.sort((a, b) => a.t - b.t);
}

/** @param {Mark} mark @param {ReturnType<typeof theme>} colours */
const colourOf = (mark, colours) => (mark.kind === "oom" ? colours.alarm : colours.palette[mark.s % colours.palette.length]);

/**
 * Start, stop, exec, throttling and OOM as vertical lines.
 * @param {CanvasRenderingContext2D} c @param {Store} store @param {Look} look @param {(t: number) => number} px
 * @param {number} top @param {number} bottom @param {ReturnType<typeof theme>} colours
 */
function marks(c, store, look, px, top, bottom, colours) {
  c.setLineDash([2, 3]);
  for (const mark of seen(store, look)) {
    const x = Math.round(px(mark.t)) + 0.5;
    c.strokeStyle = colourOf(mark, colours);
    c.lineWidth = mark.kind === "oom" ? 2 : 1;
    c.beginPath();
    c.moveTo(x, top - 2);
    c.lineTo(x, bottom);
    c.stroke();
  }
  c.setLineDash([]);
}

const WORDS_HEIGHT = 12;
const WORDS_ROWS = 4;
const TOGETHER = 64; // pixels within which the same thing happening again is said once, with how often

/**
 * The words of the marks and their places, no two over each other; what finds no room keeps its line only.
 * @param {CanvasRenderingContext2D} c @param {Store} store @param {Look} look @param {(t: number) => number} px
 * @param {number} left @param {number} right @param {ReturnType<typeof theme>} colours
 */
function words(c, store, look, px, left, right, colours) {
  /** @type {Mark[][]} */
  const groups = [];
  for (const mark of seen(store, look)) {
    const group = groups.findLast((one) => one[0].kind === mark.kind && mark.kind !== "exec");
    if (group && px(mark.t) - px(group[group.length - 1].t) < TOGETHER) group.push(mark);
    else groups.push([mark]);
  }
  c.font = `600 10px ${colours.font}`;
  /** @type {{ text: string, colour: string, from: number, to: number, row: number }[]} */
  const placed = [];
  for (const group of groups) {
    const text = wordOf(group, store.targets);
    const width = c.measureText(text).width + 4;
    const from = Math.max(left + 2, Math.min(px(group[0].t) + 4, right - width));
    const place = { from, to: from + width };
    const rows = [...Array(WORDS_ROWS).keys()];
    const row = rows.find((r) => placed.every((one) => one.row !== r || one.to <= place.from || place.to <= one.from));
    const ofMany = group.some((mark) => mark.s !== group[0].s) && group[0].kind !== "oom";
    if (row !== undefined) placed.push({ ...place, text, colour: ofMany ? colours.ink : colourOf(group[0], colours), row });
  }
  return placed;
}

/** @param {Mark[]} group the same thing, near in time @param {Target[]} targets */
function wordOf(group, targets) {
  const { kind, text } = group[0];
  const alone = group.length === 1 && text;
  /** @type {Record<string, string>} */
  const named = { oom: "OOM kill", stop: alone ? `stop (${text})` : "stop", exec: `exec ${text.length > 22 ? `${text.slice(0, 21)}…` : text}` };
  const whom = [...new Set(group.map((mark) => mark.s))];
  const times = group.length > whom.length ? ` ×${group.length}` : "";
  const names = whom.slice(0, 2).map((index) => shortened(targets[index]?.name ?? ""));
  const who = whom.length === targets.length ? "" : ` ${names.join(", ")}${whom.length > 2 ? ` +${whom.length - 2}` : ""}`;
  return kind === "exec" ? `${who.trim()}${who && " "}${named.exec}` : `${named[kind] ?? kind}${times}${who}`;
}

/**
 * Words that a line behind them does not strike through.
 * @param {CanvasRenderingContext2D} c @param {string} text @param {number} x @param {number} y @param {string} colour
 * @param {ReturnType<typeof theme>} colours
 */
function halo(c, text, x, y, colour, colours) {
  const width = c.measureText(text).width;
  c.fillStyle = colours.paper;
  c.globalAlpha = 0.85;
  c.fillRect(c.textAlign === "right" ? x - width - 2 : x - 2, y - WORDS_HEIGHT / 2, width + 4, WORDS_HEIGHT);
  c.globalAlpha = 1;
  c.lineJoin = "round";
  c.lineWidth = 3;
  c.strokeStyle = colours.paper;
  c.strokeText(text, x, y);
  c.fillStyle = colour;
  c.fillText(text, x, y);
}

/**
 * @param {CanvasRenderingContext2D} c @param {number[]} limits @param {Store} store
 * @param {{ left: number, right: number, top: number, high: number, py: (v: number) => number }} box
 * @param {ReturnType<typeof theme>} colours @param {string} unit
 */
function limitLines(c, limits, store, box, colours, unit) {
  const different = [...new Set(limits.filter(Number.isFinite))].sort((a, b) => b - a);
  let above = 0;
  let last = { y: -1e9, at: -1e9, width: 0 };
  for (const limit of different) {
    const words = `${whose(limit, limits, store)}limit ${say(limit, unit)}`;
    c.textAlign = "right";
    if (limit > box.high) {
      halo(c, `${words}, far above`, box.right - 3, box.top + 8 + 12 * above++, colours.alarm, colours);
      continue;
    }
    const y = Math.round(box.py(limit)) + 0.5;
    c.strokeStyle = colours.alarm;
    c.setLineDash([6, 4]);
    c.lineWidth = 1.2;
    c.beginPath();
    c.moveTo(box.left, y);
    c.lineTo(box.right, y);
    c.stroke();
    c.setLineDash([]);
    // Below its line where the line of another limit is close above; beside other words, not over them.
    const crossed = y - last.y < 17 && box.py(0) - y > 16;
    const at = crossed || y - box.top <= 14 ? y + 8 : y - 7;
    const shift = Math.abs(at - last.at) < 12 ? last.width + 12 : 0;
    halo(c, words, box.right - 3 - shift, at, colours.alarm, colours);
    last = { y, at, width: shift + c.measureText(words).width };
  }
}

/** @param {string} name */
const shortened = (name) => (name.length > 24 ? `${name.slice(0, 23)}…` : name);

/** Who has this limit, where not all have it. @param {number} limit @param {number[]} limits @param {Store} store */
function whose(limit, limits, store) {
  const names = store.targets.filter((_, index) => limits[index] === limit).map((target) => shortened(target.name));
  if (names.length === store.targets.length) return "";
  return `${names.slice(0, 2).join(", ")}${names.length > 2 ? ` +${names.length - 2}` : ""}: `;
}

/**
 * The place of the point nearest to `t`, or -1. @param {Columns | undefined} data @param {number} t
 */
function nearest(data, t) {
  if (!data || !data.t.length) return -1;
  let low = 0;
  let high = data.t.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (data.t[middle] < t) low = middle + 1;
    else high = middle;
  }
  return low > 0 && t - data.t[low - 1] < data.t[low] - t ? low - 1 : low;
}

/** The same, and -1 where nothing was measured within two seconds. @param {Columns | undefined} data @param {number} t */
function near(data, t) {
  const i = nearest(data, t);
  return i >= 0 && data && Math.abs(data.t[i] - t) <= 2 ? i : -1;
}

/** A moment of the time axis. @param {number} t */
function clock(t) {
  return t >= 120 ? `${Math.floor(t / 60)}:${(t % 60).toFixed(0).padStart(2, "0")}` : `${t.toFixed(1)} s`;
}

/**
 * @param {CanvasRenderingContext2D} c @param {Store} store @param {number} at @param {"cpu" | "mem" | "thr" | "pids"} key
 * @param {string} unit @param {any} box @param {ReturnType<typeof theme>} colours @param {number | null} chosen
 */
function crosshair(c, store, at, key, unit, box, colours, chosen) {
  const x = Math.round(box.px(at)) + 0.5;
  if (x < box.left || x > box.right) return;
  c.strokeStyle = colours.muted;
  c.lineWidth = 1;
  c.beginPath();
  c.moveTo(x, box.top);
  c.lineTo(x, box.bottom);
  c.stroke();
  const words = [clock(at)];
  store.data.forEach((data, index) => {
    const i = near(data, at);
    if (i < 0 || !Number.isFinite(data[key][i]) || (chosen ?? index) !== index) return;
    c.fillStyle = colours.palette[index % colours.palette.length];
    c.beginPath();
    c.arc(box.px(data.t[i]), box.py(data[key][i]), 3.5, 0, 7);
    c.fill();
    if (chosen !== null || store.data.length <= MANY) words.push(say(data[key][i], unit));
  });
  c.fillStyle = colours.ink;
  c.textAlign = "right";
  c.font = `600 11px ${colours.font}`;
  c.fillText(words.join("   "), box.right, box.top - 12);
}

// -- a picture that stays

const STILL = { width: 1000, height: 350, scale: 1.6, legend: 20, columns: 4 };

/**
 * All that was measured, as a PNG with its legend: what a notebook has that is saved now. Null before the first figures.
 * @param {Store} store
 */
function still(store) {
  if (!store.targets.length || !store.data.some((data) => data.t.length)) return null;
  const { width, height, scale, legend, columns } = STILL;
  const top = 8 + legend * Math.ceil(store.targets.length / columns);
  const canvas = /** @type {HTMLCanvasElement} */ (make("canvas", { width: String(width * scale), height: String((top + height + 6) * scale) }));
  const c = canvas.getContext("2d");
  if (!c) return null;
  const colours = theme(null);
  c.scale(scale, scale);
  c.fillStyle = colours.paper;
  c.fillRect(0, 0, width, top + height + 6);
  c.textBaseline = "middle";
  store.targets.forEach((target, index) => {
    const x = 6 + (index % columns) * ((width - 12) / columns);
    const y = 12 + legend * Math.floor(index / columns);
    c.strokeStyle = colours.palette[index % colours.palette.length];
    c.lineWidth = 3;
    c.setLineDash(dashes(index));
    c.beginPath();
    c.moveTo(x, y);
    c.lineTo(x + 24, y);
    c.stroke();
    c.font = `600 12px ${colours.font}`;
    c.fillStyle = colours.ink;
    c.fillText(shortened(target.name), x + 30, y);
  });
  c.setLineDash([]);
  c.translate(0, top);
  const to = Math.max(1, ...store.data.map((data) => data.t.at(-1) ?? 0));
  for (const place of layout(width, height)) panel(c, store, { from: 0, to, at: null, chosen: null }, colours, place);
  const png = canvas.toDataURL("image/png").split(",")[1];
  const text = `monitor of ${store.targets.map((target) => target.name).join(", ")}: the last picture`;
  return { data: { "image/png": png, "text/plain": text }, metadata: { "image/png": { width } } };
}

const CSS_CLASS = "labkernel-monitor";

/** @param {string} tag @param {Record<string, string>} [attributes] @param {...(Node | string)} children */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/**
 * One view of the model. Returns what undoes it.
 * @param {Model} model @param {Store} store @param {HTMLElement} el
 */
function view(model, store, el) {
  const pause = /** @type {HTMLButtonElement} */ (make("button", { type: "button", title: "Pause the picture (space); drag over the plot to zoom in" }, "Pause"));
  const stop = /** @type {HTMLButtonElement} */ (make("button", { type: "button", title: "Stop measuring and keep a picture" }, "End"));
  const span = /** @type {HTMLSelectElement} */ (make("select", { "aria-label": "Time shown", title: "Time shown (+ and -)" }));
  for (const seconds of WINDOWS) {
    span.append(make("option", { value: String(seconds) }, seconds === 0 ? "all" : seconds < 60 ? `${seconds} s` : `${seconds / 60} min`));
  }
  span.value = String(WINDOWS.includes(model.get("window_s")) ? model.get("window_s") : 60);
  const legend = make("div", { class: "legend" });
  const note = make("div", { class: "note", role: "alert" });
  const status = make("span", { class: "status", role: "status" });
  const canvas = /** @type {HTMLCanvasElement} */ (make("canvas", { role: "img", "aria-label": "waiting for figures" }));
  const root = make(
    "div",
    // Lumino would take keys pressed in here for notebook shortcuts.
    { class: CSS_CLASS, tabindex: "0", role: "group", "aria-label": "Live monitor", "data-lm-suppress-shortcuts": "true" },
    make("div", { class: "bar" }, legend, make("div", { class: "tools" }, status, pause, span, stop)),
    note,
    canvas,
  );
  el.append(root);

  /** @type {number | null} */
  let heldAt = null;
  /** What was dragged out of the time axis. @type {{ from: number, to: number } | null} */
  let zoomed = null;
  /** @type {{ x: number, from: number } | null} */
  let dragged = null;
  /** @type {{ figures: HTMLElement, acts: HTMLElement, can: string }[]} */
  let lines = [];
  let named = "";
  /** @type {number | null} */
  let cross = null;
  /** The target that the pointer or the keyboard is on in the legend. @type {number | null} */
  let chosen = null;
  let asked = 0;
  let spoken = 0;

  const now = () => Math.max(1, ...store.data.map((data) => data.t.at(-1) ?? 0));
  const look = () => {
    if (zoomed) return { ...zoomed, at: cross, chosen };
    const to = heldAt ?? now();
    const seconds = Number(span.value);
    const from = seconds ? Math.max(0, to - seconds) : 0;
    return { from, to: Math.max(to, from + (seconds ? Math.min(seconds, 15) : 5)), at: cross, chosen };
  };

  // The words are not left to the next frame: a browser that is busy, or a page in the background, draws none for a
  // while, and a key that was taken must show at once that it was.
  const tell = () => {
    const ended = store.state === "ended";
    const lost = !ended && store.seen > 0 && performance.now() - store.seen > 4000;
    const word = zoomed ? "zoomed (Esc: back)" : heldAt !== null ? "paused" : store.seen ? "live" : "waiting";
    status.textContent = ended ? "ended" : lost ? "no figures: has the kernel stopped?" : word;
    status.className = `status ${ended ? "ended" : lost ? "lost" : heldAt !== null || zoomed ? "paused" : "live"}`;
    note.textContent = store.note;
    stop.disabled = ended || lost;
    for (const button of legend.querySelectorAll("button")) button.disabled = lost;
    pause.textContent = heldAt === null ? "Pause" : "Resume";
    pause.setAttribute("aria-pressed", String(heldAt !== null));
  };
  const paint = () => {
    asked = 0;
    tellTargets();
    tell();
    root.classList.toggle("many", store.targets.length > 2);
    draw(canvas, store, look());
    if (performance.now() - spoken > 5000) {
      spoken = performance.now();
      canvas.setAttribute("aria-label", `Live plot. ${legend.textContent}. ${status.textContent}`);
    }
  };
  // The legend is made anew only when there are other targets: its buttons must keep the keyboard, and a click that has
  // begun, while figures come in several times a second.
  const tellTargets = () => {
    const { palette, dark } = theme(root);
    const key = JSON.stringify([store.targets.map((target) => target.name), dark]);
    if (key !== named) {
      named = key;
      lines = store.targets.map(() => ({ figures: make("span", { class: "figures" }), acts: make("span", { class: "acts" }), can: "?" }));
      legend.replaceChildren(
        ...store.targets.map((target, index) => {
          const swatch = make("span", { class: "swatch" });
          const stroke = `stroke="${palette[index % palette.length]}" stroke-width="3" stroke-dasharray="${dashes(index)}"`;
          swatch.innerHTML = `<svg width="26" height="4"><line x2="26" y1="2" y2="2" ${stroke}/></svg>`;
          const line = make("span", { class: "target" }, swatch, make("b", { title: target.name }, target.name), lines[index].figures, lines[index].acts);
          if (store.targets.length > 1) standOut(line, index);
          return line;
        }),
      );
    }
    store.targets.forEach((target, index) => {
      const data = store.data[index];
      const i = cross === null ? (data ? data.t.length - 1 : -1) : near(data, cross);
      const known = i >= 0 && (Number.isFinite(data.cpu[i]) || Number.isFinite(data.mem[i]));
      lines[index].figures.textContent = i < 0 ? "" : known ? `${say(data.cpu[i], "%")}, ${say(data.mem[i], "MiB")}` : "not running";
      const can = store.state === "ended" ? "" : (target.can ?? []).join();
      if (can !== lines[index].can) {
        lines[index].can = can;
        offer(target, index);
      }
    });
  };
  /** Its curve stands out while the pointer or the keyboard is on it. @param {HTMLElement} line @param {number} index */
  const standOut = (line, index) => {
    const choose = (/** @type {number | null} */ one) => () => {
      chosen = one;
      ask();
    };
    line.addEventListener("pointerenter", choose(index));
    line.addEventListener("pointerleave", choose(null));
    line.addEventListener("focusin", choose(index));
    line.addEventListener("focusout", choose(null));
  };
  /** Buttons of what may be done to a target. @param {Target} target @param {number} index */
  const offer = (target, index) => {
    const verbs = lines[index].can ? lines[index].can.split(",") : [];
    const buttons = verbs.map((verb) => {
      const button = make("button", { type: "button", class: `act ${verb}`, title: `${verb} ${target.name}` }, verb);
      button.addEventListener("click", () => confirm(target, index, verb));
      return button;
    });
    lines[index].acts.replaceChildren(...buttons);
  };
  /** @param {Target} target @param {number} index @param {string} verb */
  const confirm = (target, index, verb) => {
    const yes = make("button", { type: "button", class: `act ${verb}` }, `yes, ${verb}`);
    const no = make("button", { type: "button", class: "act" }, "no");
    const back = () => {
      offer(target, index);
      /** @type {HTMLElement | null} */ (lines[index].acts.querySelector(`.${verb}`))?.focus();
    };
    yes.addEventListener("click", () => {
      store.note = "";
      model.send({ kind: "act", index, verb });
      back();
    });
    no.addEventListener("click", back);
    lines[index].acts.replaceChildren(make("span", { class: "question" }, `${verb} ${target.name}?`), yes, no);
    yes.focus();
  };
  const ask = () => {
    if (!asked) asked = requestAnimationFrame(paint);
  };
  const toggle = () => {
    heldAt = heldAt === null ? now() : null;
    tell();
    ask();
  };
  /** @param {number} step */
  const zoom = (step) => {
    const index = WINDOWS.indexOf(Number(span.value));
    span.value = String(WINDOWS[Math.min(WINDOWS.length - 1, Math.max(0, index + step))]);
    ask();
  };
  /** @param {number} step */
  const move = (step) => {
    const { from, to } = look();
    cross = Math.min(to, Math.max(from, (cross ?? Math.min(to, now())) + (step * (to - from)) / 60));
    ask();
  };
  /** @type {Record<string, () => void>} */
  const keys = {
    " ": toggle,
    "+": () => zoom(-1),
    "-": () => zoom(1),
    ArrowLeft: () => move(-1),
    ArrowRight: () => move(1),
    Escape: () => {
      cross = null;
      zoomed = null;
      tell();
      ask();
    },
  };
  root.addEventListener("keydown", (event) => {
    const inControl = event.target instanceof HTMLButtonElement || event.target instanceof HTMLSelectElement;
    if (inControl || !keys[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    event.stopPropagation();
    keys[event.key]();
  });
  pause.addEventListener("click", toggle);
  span.addEventListener("change", ask);
  stop.addEventListener("click", () => {
    stop.disabled = true;
    model.send({ kind: "stop" });
  });
  /** The time under the pointer. @param {PointerEvent} event */
  const timeAt = (event) => {
    const x = event.clientX - canvas.getBoundingClientRect().left;
    const place = layout(canvas.clientWidth, canvas.clientHeight).find((one) => x >= one.x && x <= one.x + one.w);
    if (!place) return null;
    const { from, to } = look();
    return Math.min(to, Math.max(from, from + ((x - place.x - 40) / (place.w - 46)) * (to - from)));
  };
  canvas.addEventListener("pointermove", (event) => {
    cross = timeAt(event) ?? cross;
    ask();
  });
  canvas.addEventListener("pointerdown", (event) => {
    const from = timeAt(event);
    dragged = from === null ? null : { x: event.clientX, from };
    // Still while something is dragged out of it.
    if (dragged && heldAt === null && !zoomed) zoomed = look();
  });
  const dropped = (/** @type {PointerEvent} */ event) => {
    if (!dragged) return;
    const to = timeAt(event) ?? dragged.from;
    const far = Math.abs(event.clientX - dragged.x) > 8;
    zoomed = far ? { from: Math.min(dragged.from, to), to: Math.max(dragged.from, to, Math.min(dragged.from, to) + 0.5) } : null;
    dragged = null;
    tell();
    ask();
  };
  canvas.addEventListener("pointerup", dropped);
  canvas.addEventListener("dblclick", keys.Escape);
  canvas.addEventListener("pointerleave", (event) => {
    dropped(event);
    cross = null;
    ask();
  });

  store.listeners.add(ask);
  const sizes = new ResizeObserver(() => {
    root.classList.toggle("narrow", root.clientWidth < 700);
    ask();
  });
  sizes.observe(root);
  const themes = new MutationObserver(ask);
  themes.observe(document.body, { attributes: true, attributeFilter: ["data-jp-theme-light", "data-jp-theme-name"] });
  const clock = setInterval(ask, 2000); // notices that the kernel is gone
  ask();
  return () => {
    clearInterval(clock);
    cancelAnimationFrame(asked);
    sizes.disconnect();
    themes.disconnect();
    store.listeners.delete(ask);
    root.remove();
  };
}

export default () => {
  /** @type {Store} */
  const store = { targets: [], data: [], marks: [], state: "waiting", seen: 0, seq: -1, whole: false, note: "", listeners: new Set() };
  return {
    /** @param {{ model: Model }} context */
    initialize({ model }) {
      /** @param {any} message @param {DataView[]} buffers */
      const take = (message, buffers) => receive(store, message, buffers);
      model.on("msg:custom", take);
      model.send({ kind: "hello" });
      // The JupyterLab extension asks for it when the notebook is saved.
      const pictures = (window.labkernelPictures ??= new Map());
      pictures.set(model.get("key"), () => still(store));
      return () => {
        pictures.delete(model.get("key"));
        model.off("msg:custom", take);
      };
    },
    /** @param {{ model: Model, el: HTMLElement }} context */
    render({ model, el }) {
      return view(model, store, el);
    },
  };
};
