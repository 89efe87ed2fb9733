/** The tree as lines over the positions of its tokens, drawn from its segments. */
class Outline {
  constructor(host, choose) {
    this.host = host;
    this.choose = choose;
  }

  show(tree, turns) {
    this.tree = tree;
    this.width = 1 + tree.position.reduce((most, value) => Math.max(most, value), 0);
    this.line = tree.lines <= 10 ? 22 : 15;
    const height = tree.lines * this.line + 4;
    const svg = this.#node("svg", { width: "100%", height, "aria-hidden": "true" });
    this.groups = tree.segments.map((segment) => this.#segment(segment));
    this.needle = this.#node("line", { class: "needle", y1: 0, y2: height, visibility: "hidden" });
    this.dot = this.#node("circle", { class: "dot", r: 4, visibility: "hidden" });
    svg.append(...this.groups, this.needle, this.dot);
    svg.addEventListener("click", (event) => this.#click(event, svg));
    const box = make("div", { class: "outline-box", tabindex: "0", role: "region",
      "aria-label": `Drawing of the tree: ${count(tree.segments.length, "segment")} on ${count(tree.lines, "line")}` });
    const labels = this.#node("svg", { class: "labels", width: 78, height, "aria-hidden": "true" });
    for (let line = 0; line < tree.lines; line++) {
      const said = tree.segments.filter((segment) => segment.line === line && segment.kind === "branch");
      const label = this.#node("text", { x: 0, y: (line + 0.5) * this.line + 5 });
      const turns = [...new Set(said.map((segment) => segment.turn))].sort((a, b) => a - b);
      label.textContent = turns.length ? ranges(turns, 2) : "context";
      labels.append(label);
    }
    box.append(labels, svg);
    this.host.replaceChildren(box);
  }

  /** Fade the segments that are off the path. */
  light(seen, current) {
    this.tree.segments.forEach((segment, number) => {
      this.groups[number].classList.toggle("off", seen !== null && !seen[segment.start]);
    });
    const visibility = current === null ? "hidden" : "visible";
    for (const mark of [this.needle, this.dot]) mark.setAttribute("visibility", visibility);
    if (current === null) return;
    const x = this.#x(this.tree.position[current] + 0.5);
    const line = this.tree.segments[this.tree.segmentOf(current)].line;
    this.needle.setAttribute("x1", x);
    this.needle.setAttribute("x2", x);
    this.dot.setAttribute("cx", x);
    this.dot.setAttribute("cy", (line + 0.5) * this.line + 2);
  }

  #segment(segment) {
    const { tree } = this;
    const group = this.#node("g");
    group.append(...this.#joint(segment));
    const middle = (segment.line + 0.5) * this.line + 1;
    const half = this.line <= 15 ? 5 : 7;
    let start = segment.start;
    for (let i = start + 1; i <= segment.end; i++) {
      if (i < segment.end && tree.role[i] === tree.role[start] && tree.isTrained(i) === tree.isTrained(start)) continue;
      const place = { x: this.#x(tree.position[start]), width: `${(100 * (i - start)) / this.width}%` };
      const trained = tree.isTrained(start);
      group.append(this.#node("rect", { ...place, y: middle - (trained ? half : 3), height: trained ? 2 * half : 6,
        class: `r-${tree.roleOf(start)}` }));
      if (trained) group.append(this.#node("rect", { ...place, y: middle + half - 1, height: 2.5, class: "under" }));
      start = i;
    }
    return group;
  }

  #joint(segment) {
    const above = this.tree.segments[segment.above];
    if (!above || above.line === segment.line) return [];
    const x = this.#x(this.tree.position[segment.start]);
    return [this.#node("line", { class: "joint", x1: x, x2: x, 
      y1: (above.line + 0.5) * this.line + 1, y2: (segment.line + 0.5) * this.line + 1 })];
  }

  #click(event, svg) {
    const box = svg.getBoundingClientRect();
    const position = Math.floor(((event.clientX - box.left) / box.width) * this.width);
    const line = Math.floor((event.clientY - box.top) / this.line);
    const segment = this.tree.segments.find((s) => s.line === line && this.tree.position[s.end - 1] >= position)
      ?? this.tree.segments.findLast((s) => s.line === line);
    if (!segment) return;
    const offset = Math.max(0, Math.min(position - this.tree.position[segment.start], segment.end - 1 - segment.start));
    this.choose(segment.start + offset);
  }

  #x(position) { return `${(100 * position) / this.width}%`; }

  #node(tag, attributes = {}) {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    return element;
  }
}
