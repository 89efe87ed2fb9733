/** Numbers from [first, length, first, length, ...], each `step` more than the one before it. */
function unrun(runs, step = 0, Type = Int32Array) {
  let total = 0;
  for (let i = 1; i < runs.length; i += 2) total += runs[i];
  const values = new Type(total);
  let at = 0;
  for (let i = 0; i < runs.length; i += 2) {
    for (let j = 0; j < runs[i + 1]; j++) values[at++] = runs[i] + j * step;
  }
  return values;
}

/** One layout: T tokens in the order in which they are computed. */
class Tree {
  constructor(raw, tokens, roles, turns) {
    this.tokens = tokens;
    this.roles = roles;
    this.ids = Int32Array.from(raw.ids);
    this.size = this.ids.length;
    this.end = unrun(raw.end);
    this.position = unrun(raw.position, 1);
    this.parent = unrun(raw.parent, 1);
    this.role = unrun(raw.role);
    this.message = unrun(raw.message);
    this.joined = raw.joined;
    this.segments = raw.segments.map(([start, end, kind, turn]) => ({ start, end, kind, turn }));
    this.#relate();
    this.#supervise(raw);
    this.#outline(turns);
  }

  /** The rule of the mask. */
  visible(q, k) { return k <= q && q < this.end[k]; }

  /** 1 for each token that this one sees. */
  seen(q) {
    const seen = new Uint8Array(this.size);
    for (let k = 0; k <= q; k++) seen[k] = this.visible(q, k) ? 1 : 0;
    return seen;
  }

  /** The tokens from the root to this one. */
  path(index) {
    const path = new Int32Array(this.position[index] + 1);
    for (let at = path.length - 1, i = index; i >= 0; i = this.parent[i]) path[at--] = i;
    return path;
  }

  text(i) { return this.joined[i] ?? this.tokens.texts[this.ids[i]]; }
  isSpecial(i) { return this.tokens.special.has(this.ids[i]); }
  roleOf(i) { return this.roles[this.role[i]]; }
  isTrained(i) { return this.weight[i] > 0; }

  /** What this token is trained to predict: [{text, weight, child}]. */
  predicts(i) {
    const found = [];
    for (let at = this.firstTarget[i]; at < this.firstTarget[i + 1]; at++) {
      const child = this.children(i).find((j) => this.ids[j] === this.target[at]) ?? -1;
      found.push({ text: this.tokens.texts[this.target[at]], id: this.tokens.ids[this.target[at]],
        weight: this.targetWeight[at], child });
    }
    return found;
  }

  children(i) {
    const found = [];
    for (let j = this.firstChild[i]; j >= 0; j = this.sibling[j]) found.push(j);
    return found;
  }

  segmentOf(i) {
    let low = 0, high = this.segments.length - 1;
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (this.segments[middle].start <= i) low = middle; else high = middle - 1;
    }
    return low;
  }

  #relate() {
    this.firstChild = new Int32Array(this.size).fill(-1);
    this.sibling = new Int32Array(this.size).fill(-1);
    for (let i = this.size - 1; i >= 0; i--) {
      const above = this.parent[i];
      if (above >= 0) { this.sibling[i] = this.firstChild[above]; this.firstChild[above] = i; }
    }
  }

  /** Targets by predictor, and of each token the weight with which it is one. */
  #supervise(raw) {
    const weights = unrun(raw.weight, 0, Float64Array);
    const order = Array.from(raw.predictor.keys()).sort((a, b) => raw.predictor[a] - raw.predictor[b]);
    this.target = Int32Array.from(order, (n) => raw.target[n]);
    this.targetWeight = Float64Array.from(order, (n) => weights[n]);
    this.firstTarget = new Int32Array(this.size + 1);
    for (const p of raw.predictor) this.firstTarget[p + 1]++;
    for (let i = 0; i < this.size; i++) this.firstTarget[i + 1] += this.firstTarget[i];
    this.weight = new Float64Array(this.size);
    for (let i = 0; i < this.size; i++) {
      const above = this.parent[i];
      if (above < 0) continue;
      for (let at = this.firstTarget[above]; at < this.firstTarget[above + 1]; at++) {
        if (this.target[at] === this.ids[i]) this.weight[i] = this.targetWeight[at];
      }
    }
  }

  /** Of each segment: the one above, how far to indent it, its line in the outline, and the turns that see it. */
  #outline(turns) {
    const forks = new Int32Array(this.segments.length);
    for (const segment of this.segments) {
      const above = this.parent[segment.start];
      segment.above = above < 0 ? -1 : this.segmentOf(above);
      if (segment.above >= 0) forks[segment.above]++;
    }
    let lines = 0;
    this.segments.forEach((segment, number) => {
      const above = this.segments[segment.above];
      const straight = above && segment.above === number - 1;
      segment.depth = above ? above.depth + (forks[segment.above] > 1 && !straight ? 1 : 0) : 0;
      segment.turns = turns.filter(({ leaf }) => this.visible(leaf, segment.start)).map(({ turn }) => turn);
      segment.line = straight ? above.line : lines++;
    });
    this.lines = lines;
  }
}

/** A text with its white space written out, where that is asked for. */
function spelled(text, whitespace) {
  return whitespace ? text.replaceAll(" ", "·").replaceAll("\t", "→\t") : text;
}

/** A text on one line, in quotes. */
function quoted(text, most = 40) {
  const line = text.replaceAll("\n", "⏎");
  return `“${line.length > most ? `${line.slice(0, most - 1)}…` : line}”`;
}

const NAMES = { system: "system", prompt: "prompt", tool: "tool result", thinking: "thinking", response: "response",
  copy: "context copy" };

const plain = new Intl.NumberFormat("en");
const count = (n, one, many = `${one}s`) => `${plain.format(n)} ${n === 1 ? one : many}`;
const written = (weight) => String(Number(weight.toPrecision(4)));
