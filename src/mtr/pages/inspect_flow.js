const MOST_IN_CHUNK = 400;

/** Tokens as text, in sections. What a token sees is lit chunk by chunk, so that one step changes little. */
class Flow {
  constructor(host, { point, choose, leave }) {
    this.host = host;
    this.chunks = [];
    this.elements = new Map();
    const tokenAt = (event) => event.target.closest?.(".t")?.token;
    host.addEventListener("pointerover", (event) => {
      if (event.pointerType === "touch") return;
      const token = tokenAt(event);
      if (token !== undefined) point(token, this);  // between two lines the last one stays: nothing flickers
    });
    host.addEventListener("pointerleave", (event) => { if (event.pointerType !== "touch") leave(); });
    host.addEventListener("click", (event) => {
      const token = tokenAt(event);
      if (token !== undefined) choose(token, this, event.detail > 0);
    });
    host.addEventListener("focusin", (event) => {
      const token = tokenAt(event);
      if (token !== undefined && event.target.matches(":focus-visible")) choose(token, this, false, true);
    });
  }

  /**
   * sections: [{title, about, kind, depth, tokens}], `tokens` as indices of the tree in reading order.
   * trained: (index) => whether the token has loss where it is shown here.
   */
  show(title, tree, sections, trained, whitespace) {
    Object.assign(this, { tree, sections, trained, whitespace, chunks: [], elements: new Map(), current: null });
    this.order = Int32Array.from(sections.flatMap((section) => Array.from(section.tokens)));
    this.place = new Map(Array.from(this.order, (token, at) => [token, at]));
    this.perLine = Math.max(24, this.host.clientWidth / 9 - 12);
    const blocks = sections.map((section) => this.#section(section));
    this.host.replaceChildren(make("p", { class: "flow-title" }, title), ...blocks);
    this.#roving(this.order[0]);
  }

  #section(section) {
    const block = make("section", { class: `seg ${section.kind}`, style: `--depth:${Math.min(section.depth, 5)}` },
      make("h3", {}, section.title), make("p", { class: "about" }, section.about));
    if (section.note) block.append(make("p", { class: "about note warn" }, section.note));
    for (const tokens of chunked(section.tokens, this.tree)) block.append(this.#chunk(tokens));
    return block;
  }

  #chunk(tokens) {
    const { tree } = this;
    const element = document.createElement("div");
    element.className = "chunk";
    let characters = 0;
    let lines = 1;
    const message = tree.message[tokens[0]];
    for (const index of tokens) {
      const text = tree.text(index);
      characters += text.length;
      lines += text.includes("\n") ? 1 : 0;
      element.append(this.#token(index, text));
    }
    if (tokens.starts && message >= 0 && this.messages) element.dataset.who = this.messages[message];
    element.style.containIntrinsicBlockSize = `auto ${Math.round((lines + characters / this.perLine) * 28 + 6)}px`;
    this.chunks.push({ element, tokens, state: "" });
    return element;
  }

  #token(index, text) {
    const { tree } = this;
    const element = document.createElement("span");
    const marks = `${this.trained(index) ? " s" : ""}${tree.isSpecial(index) ? " sp" : ""}`;
    element.className = `t r-${tree.roleOf(index)}${marks}`;
    element.token = index;
    const shown = spelled(text, this.whitespace);
    if (text.includes("\n")) {
      const parts = shown.split("\n");
      parts.forEach((part, n) => {
        element.append(part);
        if (n < parts.length - 1) element.append(make("i", { class: "nl" }, "⏎"), "\n");
      });
    } else {
      element.textContent = shown;
    }
    this.elements.set(index, element);
    return element;
  }

  /** Light what `seen` has; null: everything. `next` are tokens that the current one predicts. */
  light(seen, current = null, next = []) {
    this.host.classList.toggle("active", seen !== null);
    for (const chunk of this.chunks) {
      let lit = 0;
      if (seen) for (const token of chunk.tokens) lit += seen[token];
      const state = !seen || lit === chunk.tokens.length ? "all" : lit ? "some" : "none";
      if (state === "some") {
        for (const token of chunk.tokens) this.elements.get(token).classList.toggle("lit", seen[token] === 1);
      }
      if (state !== chunk.state) {
        chunk.element.classList.remove("all", "some", "none");
        chunk.element.classList.add(state);
        chunk.state = state;
      }
    }
    for (const element of this.marked ?? []) element.classList.remove("cur", "next");
    this.marked = [];
    this.#mark(current, "cur");
    for (const token of next) this.#mark(token, "next");
  }

  #mark(token, name) {
    const element = this.elements.get(token);
    if (element) { element.classList.add(name); this.marked.push(element); }
  }

  /** One token at a time can be reached with the tab key. */
  #roving(token) {
    if (this.reached?.isConnected && this.reached.token === token) return;  // it would lose the focus
    if (this.reached) {
      for (const name of ["tabindex", "role", "aria-label", "aria-pressed"]) this.reached.removeAttribute(name);
    }
    this.reached = this.elements.get(token);
    if (!this.reached) return;
    const text = this.tree.text(token);
    this.reached.setAttribute("tabindex", "0");
    this.reached.setAttribute("role", "button");
    this.reached.setAttribute("aria-label", `${text.trim() || quoted(text)}, ${NAMES[this.tree.roleOf(token)]}`);
  }

  pressed(token, is) {
    this.#roving(token);
    this.reached?.setAttribute("aria-pressed", String(is));
  }

  focus(token) {
    this.#roving(token);
    this.reached?.focus({ preventScroll: true });
    this.reveal(token);
  }

  reveal(token) {
    const element = this.elements.get(token);
    if (!element) return;
    element.scrollIntoView({ block: "nearest", behavior: "instant" });
  }

  /** The token that a key leads to from this one; undefined: the key means nothing here. */
  step(key, token) {
    const at = this.place.get(token);
    const go = (place) => this.order[Math.max(0, Math.min(this.order.length - 1, place))];
    const number = () => this.sections.findIndex((section) => {
      const first = this.place.get(section.tokens[0]);
      return at >= first && at < first + section.tokens.length;
    });
    switch (key) {
      case "ArrowLeft": return go(at - 1);
      case "ArrowRight": return go(at + 1);
      case "ArrowUp": return this.#line(at, -1);
      case "ArrowDown": return this.#line(at, 1);
      case "Home": return this.sections[number()].tokens[0];
      case "End": return this.sections[number()].tokens.at(-1);
      case "PageUp": return this.sections[Math.max(0, number() - 1)].tokens[0];
      case "PageDown": return this.sections[Math.min(this.sections.length - 1, number() + 1)].tokens[0];
      default: return undefined;
    }
  }

  /** The nearest token on the line above or below. */
  #line(at, direction) {
    const box = (place) => this.elements.get(this.order[place]).getClientRects()[0];
    const start = box(at);
    let line = null;
    let best = at;
    let distance = Infinity;
    for (let place = at + direction; place >= 0 && place < this.order.length; place += direction) {
      const found = box(place);
      if (!found || Math.abs(found.top - start.top) < 8) continue;
      if (line === null) line = found.top;
      if (Math.abs(found.top - line) >= 8) break;
      const away = Math.abs(found.left - start.left);
      if (away < distance) { distance = away; best = place; }
    }
    return this.order[best];
  }
}

/** Pieces that begin with a message, or after a line break where one is long. */
function chunked(tokens, tree) {
  const chunks = [];
  let start = 0;
  const cut = (end, starts) => {
    if (end > start) chunks.push(Object.assign(tokens.slice(start, end), { starts: startsMessage }));
    start = end;
    startsMessage = starts;
  };
  let startsMessage = true;
  for (let at = 1; at < tokens.length; at++) {
    const message = tree.message[tokens[at]];
    const length = at - start;
    if (message >= 0 && message !== tree.message[tokens[at - 1]]) cut(at, true);
    else if (length >= 2 * MOST_IN_CHUNK || (length >= MOST_IN_CHUNK && tree.text(tokens[at - 1]).endsWith("\n"))) {
      cut(at, false);
    }
  }
  cut(tokens.length, false);
  return chunks;
}
