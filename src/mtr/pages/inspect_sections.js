/** The segments of a tree in the order of the layout. */
function treeSections(tree) {
  return tree.segments.map((segment) => {
    const { start, end, kind, depth, above } = segment;
    const first = tree.position[start], parent = tree.parent[start];
    const about = [kind === "branch" ? "trained" : "", count(end - start, "token"), `index ${start}–${end - 1}`,
      first === start ? "" : `positions ${first}–${first + end - start - 1}`,
      above >= 0 && parent !== start - 1 ? `continues token ${parent}` : ""];
    return { title: titleOf(segment), about: about.filter(Boolean).join(" · "), kind, depth,
      tokens: Int32Array.from({ length: end - start }, (_, n) => start + n) };
  });
}

/** A turn as inference sees it: what it is fed, and what it must say. */
function turnSections(path, turn) {
  return [
    { title: `What inference feeds turn ${turn.turn}`, about: count(turn.prompt, "token"), kind: "trunk",
      depth: 0, tokens: path.slice(0, turn.prompt) },
    { title: `What turn ${turn.turn} is trained to say`, about: count(turn.completion, "token"), kind: "branch",
      depth: 0, tokens: path.slice(turn.prompt) },
  ];
}

function titleOf(segment) {
  return segment.kind === "branch" ? `Turn ${segment.turn} as generated` : `Context of ${ranges(segment.turns)}`;
}

/** Ascending numbers of turns in words: turns 0–2, 5. */
function ranges(numbers, most = 6) {
  const runs = [];
  for (const number of numbers) {
    if (runs.length && number === runs.at(-1)[1] + 1) runs.at(-1)[1] = number; else runs.push([number, number]);
  }
  const shown = runs.slice(0, most).map(([low, high]) => (low === high ? low : `${low}–${high}`)).join(", ");
  return `${numbers.length === 1 ? "turn" : "turns"} ${shown}${runs.length > most ? ", …" : ""}`;
}
