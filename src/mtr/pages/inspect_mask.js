const AXIS = 10;

/** The mask as a picture that zooms, drawn as a triangle and a rectangle per run of tokens that end together. */
class Mask {
  constructor(canvas, readout, { point, choose, leave }) {
    Object.assign(this, { canvas, readout, point, choose, leave, pointers: new Map(), current: null, tree: null });
    canvas.addEventListener("wheel", (event) => this.#wheel(event), { passive: false });
    canvas.addEventListener("pointerdown", (event) => this.#down(event));
    canvas.addEventListener("pointermove", (event) => this.#move(event));
    canvas.addEventListener("pointerup", (event) => this.#up(event));
    canvas.addEventListener("pointercancel", (event) => this.pointers.delete(event.pointerId));
    canvas.addEventListener("pointerleave", () => { this.column = null; this.readout.textContent = ""; this.leave(); });
    canvas.addEventListener("keydown", (event) => this.#key(event));
    new ResizeObserver(() => this.draw()).observe(canvas);
    document.documentElement.addEventListener("themechange", () => this.draw());
  }

  show(tree) {
    this.tree = tree;
    this.blocks = [];
    for (let start = 0, i = 1; i <= tree.size; i++) {
      if (i < tree.size && tree.end[i] === tree.end[start] && tree.role[i] === tree.role[start]) continue;
      this.blocks.push({ start, stop: i, end: tree.end[start], role: tree.roleOf(start) });
      start = i;
    }
    this.canvas.setAttribute("aria-label",
      `Attention mask of ${count(tree.size, "token")}. Plus and minus zoom, arrow keys move, 0 shows all of it.`);
    this.reset();
  }

  light(current) { this.current = current; this.draw(); }

  reset() { this.view = { x: 0, y: 0, span: this.tree.size }; this.draw(); }

  /** Zoom about a place, in tokens; the middle, or the lit token, if none is given. */
  zoom(factor, x = null, y = null) {
    const { view, tree } = this;
    const middle = this.current !== null && x === null ? this.current : view.y + view.span / 2;
    const centre = [x ?? view.x + view.span / 2, y ?? middle];
    const span = Math.max(Math.min(8, tree.size), Math.min(tree.size, view.span / factor));
    const scale = span / view.span;
    this.#moveTo(centre[0] - (centre[0] - view.x) * scale, centre[1] - (centre[1] - view.y) * scale, span);
  }

  #moveTo(x, y, span = this.view.span) {
    const most = this.tree.size - span;
    this.view = { x: Math.max(0, Math.min(most, x)), y: Math.max(0, Math.min(most, y)), span };
    this.canvas.style.touchAction = span < this.tree.size ? "none" : "pan-y";
    if (!this.waiting) this.waiting = requestAnimationFrame(() => { this.waiting = null; this.draw(); });
  }

  draw() {
    const { canvas, tree } = this;
    const size = canvas.clientWidth;
    if (!tree || !size) return;
    const density = window.devicePixelRatio || 1;
    if (canvas.width !== Math.round(size * density)) canvas.width = canvas.height = Math.round(size * density);
    const paint = canvas.getContext("2d");
    paint.setTransform(density, 0, 0, density, 0, 0);
    this.cell = (size - AXIS) / this.view.span;
    const colours = Object.fromEntries(tree.roles.map((role) => [role, colour(`fill-${role}`)]));
    const base = { ground: colour("surface"), ink: colour("ink"), accent: colour("accent") };
    paint.fillStyle = base.ground;
    paint.fillRect(0, 0, size, size);
    paint.save();
    paint.beginPath();
    paint.rect(AXIS, AXIS, size, size);
    paint.clip();
    for (const block of this.blocks) this.#block(paint, block, colours, size);
    this.#cross(paint, base, size);
    paint.restore();
    this.#axes(paint, colours, base, size);
  }

  #at(token, axis) { return AXIS + (token - this.view[axis]) * this.cell; }

  /** What may see tokens [start, stop): the triangle among themselves, and the rows down to their end. */
  #block(paint, { start, stop, end, role }, colours, size) {
    const left = this.#at(start, "x"), right = this.#at(stop, "x");
    const top = this.#at(start, "y"), middle = this.#at(Math.min(stop, end), "y"), bottom = this.#at(end, "y");
    if (right < AXIS || left > size || bottom < AXIS || top > size) return;
    paint.fillStyle = colours[role];
    paint.beginPath();
    if (this.cell < 2) {
      paint.moveTo(left, top);
      paint.lineTo(right, middle);
    } else {
      const first = Math.max(start, Math.floor(Math.max(this.view.x, this.view.y)) - 1);
      const last = Math.min(stop, Math.ceil(Math.max(this.view.x, this.view.y) + this.view.span) + 1);
      paint.moveTo(left, this.#at(start, "y"));
      for (let i = first; i < last; i++) {
        paint.lineTo(this.#at(i, "x"), this.#at(i, "y"));
        paint.lineTo(this.#at(i + 1, "x"), this.#at(i, "y"));
      }
      paint.lineTo(right, this.#at(stop, "y"));
    }
    paint.lineTo(right, bottom);
    paint.lineTo(left, bottom);
    paint.closePath();
    paint.fill();
  }

  /** The row of the current token stays bright; a frame marks it, and the column that is pointed at. */
  #cross(paint, base, size) {
    if (this.current === null) return;
    const height = Math.max(this.cell, 3);
    const top = this.#at(this.current + 0.5, "y") - height / 2;
    paint.globalAlpha = 0.62;
    paint.fillStyle = base.ground;
    paint.fillRect(AXIS, AXIS, size, top - AXIS);
    paint.fillRect(AXIS, top + height, size, size);
    paint.globalAlpha = 1;
    paint.strokeStyle = base.ink;
    paint.lineWidth = 1.5;
    paint.strokeRect(AXIS - 2, top - 0.75, size + 4, height + 1.5);
    if (this.column === null || this.column === undefined) return;
    const width = Math.max(this.cell, 2);
    paint.strokeStyle = base.accent;
    paint.strokeRect(this.#at(this.column + 0.5, "x") - width / 2, AXIS - 2, width, size + 4);
  }

  #axes(paint, colours, base, size) {
    const { tree, view } = this;
    paint.fillStyle = base.ground;
    paint.fillRect(0, 0, size, AXIS);
    paint.fillRect(0, 0, AXIS, size);
    const first = Math.floor(view.y), last = Math.min(tree.size, Math.ceil(view.y + view.span));
    paint.fillStyle = base.ink;
    for (let i = first, start = first; i <= last; i++) {
      const trains = (n) => n < last && tree.firstTarget[n + 1] > tree.firstTarget[n];
      if (i < last && trains(i) === trains(start)) continue;
      if (trains(start)) paint.fillRect(2, Math.max(AXIS, this.#at(start, "y")), 4, (i - start) * this.cell);
      start = i;
    }
    for (const { start, stop, role } of this.blocks) {
      const left = Math.max(AXIS, this.#at(start, "x")), right = this.#at(stop, "x");
      if (right < AXIS || left > size) continue;
      paint.fillStyle = colours[role];
      paint.fillRect(left, 2, right - left, 5);
    }
  }

  #place(event) {
    const box = this.canvas.getBoundingClientRect();
    const of = (pixels, axis) => this.view[axis] + (pixels - AXIS) / this.cell;
    return { x: of(event.clientX - box.left, "x"), y: of(event.clientY - box.top, "y") };
  }

  #tokens({ x, y }) {
    const within = (value) => Math.max(0, Math.min(this.tree.size - 1, Math.floor(value)));
    return { q: within(y), k: within(x) };
  }

  #wheel(event) {
    if (event.deltaY > 0 && this.view.span >= this.tree.size) return;  // nothing to zoom out of: the page scrolls
    event.preventDefault();
    const { x, y } = this.#place(event);
    this.zoom(Math.exp(-Math.max(-60, Math.min(60, event.deltaY)) / 180), x, y);
  }

  #down(event) {
    this.pointers.set(event.pointerId, { x: event.clientX, y: event.clientY, moved: 0 });
    try { this.canvas.setPointerCapture(event.pointerId); } catch { /* a pointer that is gone */ }
  }

  #move(event) {
    const before = this.pointers.get(event.pointerId);
    if (!before) {
      if (event.pointerType !== "touch") this.#read(event);
      return;
    }
    const here = { x: event.clientX, y: event.clientY };
    here.moved = before.moved + Math.abs(here.x - before.x) + Math.abs(here.y - before.y);
    if (this.pointers.size === 2) {
      const other = [...this.pointers].find(([id]) => id !== event.pointerId)[1];
      const apart = (one) => Math.hypot(one.x - other.x, one.y - other.y) || 1;
      const { x, y } = this.#place({ clientX: (here.x + other.x) / 2, clientY: (here.y + other.y) / 2 });
      this.zoom(apart(here) / apart(before), x, y);
    } else {
      this.#moveTo(this.view.x - (here.x - before.x) / this.cell, this.view.y - (here.y - before.y) / this.cell);
    }
    this.pointers.set(event.pointerId, here);
  }

  #up(event) {
    const pointer = this.pointers.get(event.pointerId);
    this.pointers.delete(event.pointerId);
    if (pointer && pointer.moved < 6) this.choose(this.#tokens(this.#place(event)).q);
  }

  #read(event) {
    const { q, k } = this.#tokens(this.#place(event));
    this.column = k;
    const { tree } = this;
    this.readout.textContent = `${q} ${quoted(tree.text(q), 16)} ${tree.visible(q, k) ? "sees" : "does not see"} `
      + `${k} ${quoted(tree.text(k), 16)}`;
    this.point(q);
  }

  #key(event) {
    const step = this.view.span / 8;
    const { x, y } = this.view;
    const keys = {
      "+": () => this.zoom(1.5), "=": () => this.zoom(1.5), "-": () => this.zoom(1 / 1.5), 0: () => this.reset(),
      ArrowLeft: () => this.#moveTo(x - step, y), ArrowRight: () => this.#moveTo(x + step, y),
      ArrowUp: () => this.#moveTo(x, y - step), ArrowDown: () => this.#moveTo(x, y + step) };
    if (event.ctrlKey || event.metaKey || event.altKey || !(event.key in keys)) return;
    event.preventDefault();
    keys[event.key]();
  }
}
