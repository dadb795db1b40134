// The board of lab.dashboard(): what an engine has, live, with docker's verbs as buttons. Plain JavaScript for anywidget.
// Rows are kept and their words changed in place: a button must not vanish under the pointer once a second.
// @ts-check

/**
 * @typedef {{ id: string, cells: string[], can: string[], state: string }} Row
 * @typedef {{ on: Function, off: Function, send: Function, get: (name: string) => any }} Model
 * @typedef {{ board: Record<string, Row[]>, state: string, seen: number, note: string, logs: { of: string, text: string } | null, listeners: Set<() => void> }} Store
 */

const NAMES = /** @type {const} */ ({ containers: "Containers", vms: "Virtual machines", images: "Images", volumes: "Volumes", networks: "Networks" });
const ASKED = ["stop", "kill", "remove"];

/** @param {string} tag @param {Record<string, string>} [attributes] @param {...(Node | string)} children */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** @param {Model} model @param {Store} store @param {HTMLElement} el */
function view(model, store, el) {
  /** @type {Record<string, string[]>} */
  const titles = model.get("titles");
  const status = make("span", { class: "status", role: "status" });
  const end = /** @type {HTMLButtonElement} */ (make("button", { type: "button", title: "End and leave a plain table" }, "End"));
  const note = make("div", { class: "note", role: "alert" });
  const tabs = make("div", { class: "tabs", role: "tablist" });
  const body = make("div", { class: "body" });
  const logs = make("div", { class: "logs", hidden: "" });
  const root = make(
    "div",
    { class: "labkernel-dashboard", role: "group", "aria-label": "Dashboard", "data-lm-suppress-shortcuts": "true" },
    make("div", { class: "bar" }, tabs, make("div", { class: "tools" }, status, end)),
    note,
    body,
    logs,
  );
  el.append(root);
  let shown = "containers";
  /** The row whose question is open: "kind id verb". */
  let question = "";
  /** @type {Map<string, { row: HTMLTableRowElement, cells: HTMLElement[], acts: HTMLElement, key: string }>} */
  let rows = new Map();
  let drawn = "";

  const keys = Object.keys(NAMES);
  for (const kind of keys) {
    const tab = make("button", { type: "button", role: "tab", "data-kind": kind });
    tab.addEventListener("click", () => ((shown = kind), (question = ""), paint()));
    tab.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!step) return;
      event.preventDefault();
      shown = keys[(keys.indexOf(shown) + step + keys.length) % keys.length];
      question = "";
      paint();
      /** @type {HTMLElement | null} */ (tabs.querySelector(`[data-kind=${shown}]`))?.focus();
    });
    tabs.append(tab);
  }

  /** @param {Row} row @param {HTMLElement} acts */
  const offer = (row, acts) => {
    acts.replaceChildren();
    for (const verb of store.state === "ended" ? [] : row.can) {
      const id = `${shown} ${row.id} ${verb}`;
      if (question === id) {
        const yes = make("button", { type: "button", class: verb }, `yes, ${verb}`);
        const no = make("button", { type: "button" }, "no");
        yes.addEventListener("click", () => ((question = ""), act(row, verb), paint()));
        no.addEventListener("click", () => ((question = ""), paint(), focus(row, verb)));
        acts.replaceChildren(make("span", { class: "question" }, `${verb} ${row.cells[0]}?`), yes, no);
        yes.focus();
        return;
      }
      const button = make("button", { type: "button", class: verb, "data-verb": verb, title: `${verb} ${row.cells[0]}` }, verb);
      button.addEventListener("click", () => {
        if (ASKED.includes(verb)) question = id;
        else act(row, verb);
        paint();
      });
      acts.append(button);
    }
  };
  /** @param {Row} row @param {string} verb */
  const focus = (row, verb) => {
    /** @type {HTMLElement | null | undefined} */ (rows.get(row.id)?.acts.querySelector(`[data-verb=${verb}]`))?.focus();
  };
  /** @param {Row} row @param {string} verb */
  const act = (row, verb) => {
    store.note = "";
    model.send({ kind: "act", of: shown, id: row.id, verb });
  };

  const paint = () => {
    const ended = store.state === "ended";
    const lost = !ended && store.seen > 0 && performance.now() - store.seen > 6000;
    status.textContent = ended ? "ended" : lost ? "no answer: has the kernel stopped?" : store.seen ? "live" : "waiting";
    status.className = `status ${ended ? "ended" : lost ? "lost" : "live"}`;
    end.disabled = ended || lost;
    note.textContent = store.note;
    for (const tab of tabs.children) {
      const kind = /** @type {HTMLElement} */ (tab).dataset.kind ?? "";
      const words = `${NAMES[/** @type {keyof NAMES} */ (kind)]} ${store.board[kind]?.length ?? ""}`;
      if (tab.textContent !== words) tab.textContent = words;
      tab.setAttribute("aria-selected", String(kind === shown));
    }
    const list = store.board[shown] ?? [];
    const wanted = `${shown} ${list.map((row) => row.id).join()}`;
    if (wanted !== drawn) {
      drawn = wanted;
      rows = new Map();
      const head = make("tr", {}, ...titles[shown].map((title) => make("th", {}, title.toLowerCase())), make("th", { class: "acts" }));
      const lines = list.map((row) => {
        const cells = row.cells.map((_, i) => make("td", i === 0 ? { class: "name" } : {}));
        const acts = make("td", { class: "acts" });
        const line = /** @type {HTMLTableRowElement} */ (make("tr", {}, ...cells, acts));
        rows.set(row.id, { row: line, cells, acts, key: "" });
        return line;
      });
      body.replaceChildren(
        list.length ? make("table", { "data-kind": shown }, make("thead", {}, head), make("tbody", {}, ...lines)) : make("p", { class: "empty" }, store.seen ? "none" : ""),
      );
    }
    for (const row of list) {
      const place = rows.get(row.id);
      if (!place) continue;
      row.cells.forEach((words, i) => {
        if (place.cells[i].textContent !== words) {
          place.cells[i].textContent = words;
          place.cells[i].title = words;
        }
      });
      place.row.dataset.state = row.state;
      const open = question.startsWith(`${shown} ${row.id} `) ? question : "";
      const key = `${store.state} ${row.can.join()} ${open}`;
      if (key !== place.key) {
        place.key = key;
        offer(row, place.acts);
      }
    }
    for (const button of body.querySelectorAll("button")) button.disabled = lost;
    logs.hidden = !store.logs;
    if (store.logs && logs.dataset.text !== store.logs.text) {
      logs.dataset.text = store.logs.text;
      const close = make("button", { type: "button" }, "close");
      close.addEventListener("click", () => ((store.logs = null), (logs.dataset.text = ""), paint()));
      const text = make("pre", { tabindex: "0", "aria-label": "logs" }, store.logs.text);
      logs.replaceChildren(make("div", { class: "bar" }, make("b", {}, `logs of ${store.logs.of}`), close), text);
      text.scrollTop = text.scrollHeight;
    }
  };
  end.addEventListener("click", () => {
    end.disabled = true;
    model.send({ kind: "end" });
  });
  root.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && (question || store.logs)) {
      event.stopPropagation();
      question = "";
      store.logs = null;
      paint();
    }
  });
  store.listeners.add(paint);
  const sizes = new ResizeObserver(() => root.classList.toggle("narrow", root.clientWidth < 760));
  sizes.observe(root);
  const clock = setInterval(paint, 3000); // notices that the kernel is gone
  paint();
  return () => {
    clearInterval(clock);
    sizes.disconnect();
    store.listeners.delete(paint);
    root.remove();
  };
}

/**
 * The board as plain tables, as `Dashboard.html` in dashboard.py: what a notebook has that is saved now. Null before the
 * first look. @param {Store} store @param {Record<string, string[]>} titles
 */
function still(store, titles) {
  if (!store.seen) return null;
  const holder = make("div");
  for (const [kind, name] of Object.entries(NAMES)) {
    const list = store.board[kind] ?? [];
    if (!list.length) continue;
    const line = (/** @type {string} */ tag, /** @type {string[]} */ cells) =>
      make("tr", {}, ...cells.map((words) => make(tag, { style: "text-align:left" }, words)));
    const caption = make("caption", { style: "text-align:left" }, `${name} (${list.length})`);
    const body = make("tbody", {}, ...list.map((row) => line("td", row.cells)));
    holder.append(make("table", { class: "labkernel-table" }, caption, make("thead", {}, line("th", titles[kind])), body));
  }
  return { data: { "text/html": holder.innerHTML || "<p>nothing here yet</p>" }, metadata: {} };
}

export default () => {
  /** @type {Store} */
  const store = { board: {}, state: "waiting", seen: 0, note: "", logs: null, listeners: new Set() };
  /** @param {string} id */
  const nameOf = (id) => Object.values(store.board).flat().find((row) => row.id === id)?.cells[0] ?? id.slice(0, 12);
  return {
    /** @param {{ model: Model }} context */
    initialize({ model }) {
      /** @param {any} message */
      const take = (message) => {
        if (message.kind === "board") {
          store.seen = performance.now();
          store.state = message.state;
          Object.assign(store.board, message.board);
        } else if (message.kind === "note") store.note = `${nameOf(message.of)}: ${message.text}`;
        else if (message.kind === "logs") store.logs = { of: nameOf(message.of), text: message.text };
        store.listeners.forEach((listener) => listener());
      };
      model.on("msg:custom", take);
      model.send({ kind: "hello" });
      // The JupyterLab extension asks for it when the notebook is saved.
      const pictures = (window.labkernelPictures ??= new Map());
      pictures.set(model.get("key"), () => still(store, model.get("titles")));
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
