const MODES = [["tree", "Single pass"], ["turn", "One turn"], ["both", "Side by side"]];

class App {
  constructor(data) {
    const find = (id) => document.getElementById(id);
    this.find = find;
    this.data = data;
    this.tokens = { ...data.tokens, special: new Set(data.tokens.special) };
    this.mode = "tree";
    this.kept = null;
    this.pointed = null;
    const acts = { point: (token) => this.point(token), leave: () => this.point(null),
      choose: (token, flow, toggle, quiet) => this.keep(token, { toggle, quiet }) };
    this.treeFlow = new Flow(find("tree-flow"), acts);
    this.turnFlow = new Flow(find("turn-flow"), acts);
    this.outline = new Outline(find("outline"), (token) => this.go(token));
    this.mask = new Mask(find("mask"), find("mask-read"), { ...acts, choose: (token) => this.go(token, false) });
    this.detail = new Detail(find("detail"), find("live"), (token) => this.go(token));
    this.#controls();
    this.#place();
    this.rows = new RowList(data.rows, this.tokens.texts, (number) => this.#choose(number));
    const wanted = new URLSearchParams(location.hash.slice(1));
    const number = (name) => (/^\d+$/.test(wanted.get(name)) ? Number(wanted.get(name)) : null);
    this.open(number("row") < data.rows.length ? number("row") ?? 0 : 0);
    if (number("token") !== null && number("token") < this.tree?.size) this.go(number("token"), false);
  }

  // ------------------------------------------------------------------------------------------ what is shown

  open(number) {
    const row = this.data.rows[number];
    if (!row) { this.find("row-title").textContent = "No rows"; this.#empty(true); return; }
    this.number = number;
    this.row = row;
    const name = row.where.slice(row.where.lastIndexOf("/") + 1);
    this.find("row-title").textContent = row.index === null ? name : `Row ${row.index} · ${name}`;
    this.find("opening").textContent = row.opening ?? "";
    this.find("opening").title = row.where;
    this.rows.mark(number);
    row.trees ??= [];
    row.turns ??= [];
    this.#stats();
    this.#remarks();
    this.#empty(row.trees.length === 0);
    this.#selects();
    this.#legend();
    this.kept = this.pointed = null;
    this.detail.hint();
    if (row.trees.length) this.openTree(0);
  }

  openTree(number) {
    this.treeNumber = number;
    this.find("tree").value = String(number);
    this.row.built ??= [];
    this.tree = this.row.built[number] ??= new Tree(this.row.trees[number], this.tokens, this.data.roles,
      this.row.turns.filter((turn) => turn.tree === number && turn.leaf !== undefined));
    const here = this.row.turns.find((turn) => turn.tree === number);
    const now = this.row.turns[this.turn];
    if (here && (!now || (now.tree !== undefined && now.tree !== number))) this.turn = this.row.turns.indexOf(here);
    this.kept = this.pointed = null;
    this.outline.show(this.tree);
    this.find("shape-note").textContent = this.#shape();
    this.mask.show(this.tree);
    this.#flows();
  }

  #shape() {
    const turns = this.row.turns.filter((turn) => turn.tree === this.treeNumber).length;
    const straight = turns > 1 ? "All turns are on one path." : "One turn on one path.";
    const forked = "Each line is one that inference sees; "
      + "lines part where the template drops what an earlier turn said.";
    return `${this.tree.lines === 1 ? straight : forked} Across: the position of a token on its path. `
      + "Thick with an underline: trained. Thin: context.";
  }

  #flows() {
    const { tree, row } = this;
    this.find("tree-flow").hidden = this.mode === "turn";
    this.find("turn-flow").hidden = this.mode === "tree";
    this.find("flows").classList.toggle("beside", this.mode === "both");
    this.find("turn-label").hidden = this.mode === "tree";
    this.find("turn").value = String(this.turn ?? 0);
    this.treeFlow.messages = this.turnFlow.messages = row.messages;
    if (this.mode !== "turn") {
      const trees = row.trees.length;
      const what = trees > 1 ? `Tree ${this.treeNumber + 1} of ${trees}` : "All turns in a single pass";
      const title = `${what}: ${count(tree.size, "token")}. Point at one, or tap it.`;
      this.treeFlow.show(title, tree, treeSections(tree), (i) => tree.isTrained(i), this.whitespace);
    }
    if (this.mode !== "tree") this.#turnFlow();
    this.light();
  }

  #turnFlow() {
    const turn = this.row.turns[this.turn];
    const { tree } = this;
    if (!turn || turn.leaf === undefined) {
      this.turnFlow.show("", tree, [], () => false, this.whitespace);
      this.find("turn-flow").replaceChildren(...this.#untrained(turn));
      return;
    }
    const path = tree.path(turn.leaf);
    const own = new Set(path.slice(turn.prompt));
    const title = `Turn ${turn.turn} alone, as inference sees it: ${count(path.length, "token")}`;
    this.turnFlow.show(title, tree, turnSections(path, turn), (i) => own.has(i) && tree.isTrained(i), this.whitespace);
  }

  #untrained(turn) {
    if (!turn) return [];
    const part = `The first ${plain.format(turn.shown)} of ${count(turn.completion, "token")}:`;
    return [make("h3", {}, `Turn ${turn.turn}: not trained`), make("p", { class: "note warn" }, turn.reason),
      turn.shown < turn.completion ? make("p", { class: "muted small" }, part) : null,
      turn.text ? make("pre", { class: "plain" }, turn.text) : null].filter(Boolean);
  }

  // ------------------------------------------------------------------------------------------ the token

  get current() { return this.pointed ?? this.kept; }

  point(token) {
    if (token === this.pointed) return;
    this.pointed = token;
    this.light();
  }

  /** Keep a token lit. `toggle`: a second time lets go. `quiet`: it has the focus already. */
  keep(token, { toggle = false, quiet = false } = {}) {
    const again = toggle && this.kept === token;
    this.kept = again ? null : token;
    if (again) this.pointed = null;
    if (!again && this.mode === "both") this.#follow(token);
    this.light();
    for (const flow of [this.treeFlow, this.turnFlow]) if (flow.elements.has(token)) flow.pressed(token, !again);
    if (!again) this.detail.announce();
    if (!quiet) this.#remember();
  }

  letGo() {
    const token = this.kept;
    this.kept = this.pointed = null;
    for (const flow of [this.treeFlow, this.turnFlow]) if (flow.elements.has(token)) flow.pressed(token, false);
    this.light();
    this.#remember();
  }

  /** Keep a token, and bring it into view. */
  go(token, focus = true) {
    if (token === null || token < 0) return;
    this.pointed = null;
    this.keep(token);
    const flow = this.#flowOf(token);
    if (focus) flow?.focus(token); else flow?.reveal(token);
  }

  /** Beside the tree, show the turn that a token belongs to, and the token in it. */
  #follow(token) {
    const segment = this.tree.segments[this.tree.segmentOf(token)];
    if (!this.turnFlow.elements.has(token)) {
      const turn = this.row.turns.findIndex((one) => one.turn === segment.turns.at(-1));
      if (turn >= 0) {
        this.turn = turn;
        this.find("turn").value = String(turn);
        this.#turnFlow();
      }
    }
    for (const flow of [this.treeFlow, this.turnFlow]) flow.reveal(token);
  }

  #flowOf(token) {
    const flows = this.mode === "turn" ? [this.turnFlow] : [this.treeFlow, this.turnFlow];
    return flows.find((flow) => flow.elements.has(token));
  }

  light() {
    const token = this.current;
    if (!this.tree) return;
    this.seen = token === null ? null : this.tree.seen(token);
    const next = token === null ? [] : this.tree.predicts(token).map((one) => one.child);
    if (this.mode !== "turn") this.treeFlow.light(this.seen, token, next);
    if (this.mode !== "tree") this.turnFlow.light(this.seen, token, next);
    this.outline.light(this.seen, token);
    this.mask.light(token);
    document.body.classList.toggle("has-token", token !== null);
    if (token === null) this.detail.hint(); else this.detail.show(this, token, this.kept === token);
  }

  #key(event, flow) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const token = event.target.token;
    if (token === undefined) return;
    const related = { p: () => this.tree.parent[token], n: () => this.tree.predicts(token).map((one) => one.child)
      .find((child) => flow.elements.has(child)) ?? token };
    if (event.key === "Enter" || event.key === " ") this.keep(token, { toggle: true });
    else if (event.key in related) this.#goIn(flow, related[event.key]());
    else {
      const next = flow.step(event.key, token);
      if (next === undefined) return;
      this.#goIn(flow, next);
    }
    event.preventDefault();
  }

  #goIn(flow, token) {
    if (token < 0 || !flow.elements.has(token)) return;
    this.pointed = null;
    this.keep(token, { quiet: true });
    flow.focus(token);
    this.#remember();
  }

  // ------------------------------------------------------------------------------------------ around it

  #controls() {
    const { find } = this;
    for (const flow of [this.treeFlow, this.turnFlow]) {
      flow.host.addEventListener("keydown", (event) => this.#key(event, flow));
    }
    document.addEventListener("keydown", (event) => {
      if (event.key !== "Escape" || this.current === null) return;
      this.letGo();
    });
    const choices = MODES.map(([mode, label]) => make("button", { type: "button", role: "radio", "data-mode": mode,
      onclick: () => this.#setMode(mode) }, label));
    find("mode").append(...choices);
    find("mode").addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (!step) return;
      event.preventDefault();
      const at = (MODES.findIndex(([mode]) => mode === this.mode) + step + MODES.length) % MODES.length;
      this.#setMode(MODES[at][0]);
      choices[at].focus();
    });
    this.#checkMode();
    find("tree").addEventListener("change", () => this.openTree(Number(find("tree").value)));
    find("turn").addEventListener("change", () => this.setTurn(Number(find("turn").value)));
    find("whitespace").addEventListener("click", () => {
      this.whitespace = !this.whitespace;
      find("whitespace").setAttribute("aria-pressed", String(this.whitespace));
      if (this.tree) this.#flows();
    });
    find("help").addEventListener("click", () => {
      find("keys").hidden = !find("keys").hidden;
      find("help").setAttribute("aria-expanded", String(!find("keys").hidden));
    });
    find("zoom-in").addEventListener("click", () => this.mask.zoom(1.5));
    find("zoom-out").addEventListener("click", () => this.mask.zoom(1 / 1.5));
    find("zoom-all").addEventListener("click", () => this.mask.reset());
  }

  /** On a narrow screen the mask stands before the tokens, however many they are. */
  #place() {
    const narrow = matchMedia("(max-width: 1080px)");
    const card = this.find("mask-card");
    const place = () => {
      if (narrow.matches) this.find("bar").before(card); else document.querySelector(".side").append(card);
    };
    narrow.addEventListener("change", place);
    place();
  }

  #setMode(mode) {
    this.mode = mode;
    this.#checkMode();
    if (this.tree) this.#flows();
  }

  #checkMode() {
    for (const button of this.find("mode").children) {
      const is = button.dataset.mode === this.mode;
      button.setAttribute("aria-checked", String(is));
      button.tabIndex = is ? 0 : -1;
    }
  }

  setTurn(number) {
    this.turn = number;
    const { tree } = this.row.turns[number];
    if (tree !== undefined && tree !== this.treeNumber) this.openTree(tree);
    else this.#flows();
  }

  #selects() {
    const { find, row } = this;
    find("tree").replaceChildren(...row.trees.map((tree, n) =>
      make("option", { value: n }, `${n + 1} of ${row.trees.length}: ${count(tree.ids.length, "token")}`)));
    find("tree-label").hidden = row.trees.length < 2;
    const sizes = (turn) => (turn.leaf === undefined ? "not trained" : `${turn.prompt} + ${turn.completion} tokens`);
    find("turn").replaceChildren(...row.turns.map((turn, n) =>
      make("option", { value: n }, `${turn.turn}: ${sizes(turn)}`)));
    this.turn = Math.max(0, row.turns.findLastIndex((turn) => turn.leaf !== undefined));
  }

  #empty(is) {
    for (const id of ["shape", "bar", "legend", "flows", "mask-card"]) this.find(id).hidden = is;
    document.querySelector(".side").hidden = is;
    if (is) this.tree = null;
  }

  #stats() {
    const { num_tokens: tokens, flops, turns } = this.row;
    const shown = [];
    if (tokens) {
      const single = tokens.single_pass, apart = tokens.per_turn;
      const times = (ratio) => `${ratio.toFixed(2)}×`;
      shown.push(["tokens in a single pass", plain.format(single)]);
      shown.push(["tokens, one pass per turn", plain.format(apart)]);
      if (single) shown.push(single < apart ? ["fewer tokens", times(apart / single)] : ["tokens saved", "none"]);
      if (flops && flops.single_pass > 0) shown.push(["less work", times(flops.per_turn / flops.single_pass)]);
      shown.push(["supervised tokens", plain.format(tokens.supervised)]);
      shown.push(["turns trained", `${turns.filter((turn) => turn.leaf !== undefined).length} of ${turns.length}`]);
    }
    this.find("stats").replaceChildren(...shown.map(([term, value]) =>
      make("div", {}, make("dt", {}, term), make("dd", {}, value))));
  }

  /** Why a row or some of its turns are not trained, and what the template did. */
  #remarks() {
    const found = new Map();
    for (const turn of this.row.turns) {
      const lost = turn.leaf === undefined;
      for (const line of lost ? [`not trained: ${turn.reason}`] : (turn.notes ?? [])) {
        if (!found.has(line)) found.set(line, { lost, turns: [] });
        found.get(line).turns.push(turn.turn);
      }
    }
    const notes = [...found].map(([line, { lost, turns }]) => {
      const who = ranges(turns);
      const text = `${who[0].toUpperCase()}${who.slice(1)}${lost ? "" : ":"} ${line}`;
      return make("p", { class: `note${lost ? " warn" : ""}` }, text);
    });
    if (this.row.skipped) notes.push(make("p", { class: "note warn" }, `This row is not trained: ${this.row.skipped}`));
    this.find("remarks").replaceChildren(...notes);
  }

  #legend() {
    const used = new Set(this.row.trees.flatMap((tree) => tree.role.filter((_, n) => n % 2 === 0)));
    const item = (marks, text) => make("li", {}, make("span", { class: `t ${marks}` }, text));
    const roles = this.data.roles.filter((_, n) => used.has(n)).map((role) => item(`r-${role}`, NAMES[role] ?? role));
    this.find("legend").replaceChildren(...roles,
      item("r-response s", "underlined: trained"), item("r-prompt sp", "framed: special token"));
  }

  #choose(number) {
    this.open(number);
    this.#remember();
    this.find("row-title").scrollIntoView({ block: "nearest" });
  }

  #remember() {
    const token = this.kept === null ? "" : `&token=${this.kept}`;
    try { history.replaceState(null, "", `#row=${this.number}${token}`); } catch { /* some viewers allow no history */ }
  }
}

const app = new App(pageData());
