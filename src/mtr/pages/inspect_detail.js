/** What a person wants to know of a token, as a list of terms. */
class Detail {
  constructor(host, live, go) {
    Object.assign(this, { host, live, go });
    this.hint();
  }

  hint() {
    this.host.replaceChildren(make("h2", {}, "Token"), make("p", { class: "muted" },
      "Point at a token, tap it, or reach it with the tab key: ",
      "here stands what it sees, what it predicts, and with which weight."));
  }

  show(app, i, kept) {
    const { tree } = app;
    const seen = app.seen.reduce((sum, one) => sum + one, 0);
    const below = tree.end[i] - i - 1;
    const predicts = tree.predicts(i);
    const segment = tree.segments[tree.segmentOf(i)];
    const message = tree.message[i];
    const above = tree.parent[i];
    const rows = [
      ["Sees", `${count(seen, "token")}: itself${seen > 1 ? ` and ${plain.format(seen - 1)} before it` : ""}`],
      ["Seen by", below ? `${count(below, "later token")}` : "no later token"],
      ["Predicts", this.#predictions(tree, predicts)],
      ["Trained", tree.isTrained(i)
        ? [`yes, weight ${written(tree.weight[i])}, predicted by `, this.#jump(tree, above)]
        : "no, it is context"],
      ["Place", `index ${plain.format(i)} of ${plain.format(tree.size)}, position ${plain.format(tree.position[i])}`],
      ["Part", titleOf(segment) + (message >= 0 ? `; message ${message} (${app.row.messages[message]})` : "")],
    ];
    const marks = `r-${tree.roleOf(i)}${tree.isTrained(i) ? " s" : ""}`;
    const close = make("button", { type: "button", class: "close quiet", "aria-label": "Let go of the token",
      onclick: () => app.letGo() }, "×");
    const terms = rows.map(([term, value]) => make("div", {}, make("dt", {}, term), make("dd", {}, ...[value].flat())));
    this.host.replaceChildren(
      make("h2", {}, make("span", { class: `big ${marks}` }, visibleText(tree.text(i))),
        make("span", { class: "muted id" }, `id ${tree.tokens.ids[tree.ids[i]]}, ${NAMES[tree.roleOf(i)]}`),
        kept ? close : ""),
      make("dl", {}, ...terms));
    const says = predicts.map((one) => `${quoted(one.text)} with weight ${written(one.weight)}`).join(", ");
    this.summary = [`${quoted(tree.text(i))}, ${NAMES[tree.roleOf(i)]}.`, `Sees ${count(seen, "token")}.`,
      `Predicts ${says || "nothing"}.`,
      tree.isTrained(i) ? `Trained with weight ${written(tree.weight[i])}.` : "Context."].join(" ");
  }

  announce() { this.live.textContent = this.summary; }

  #predictions(tree, predicts) {
    if (!predicts.length) return "nothing that counts in the loss";
    return predicts.flatMap((one, n) => [n ? ", " : "",
      one.child >= 0 ? this.#jump(tree, one.child) : make("span", { class: "mono" }, quoted(one.text)),
      ` with weight ${written(one.weight)}`]);
  }

  #jump(tree, i) {
    return make("button", { type: "button", class: "jump mono", onclick: () => this.go(i) }, quoted(tree.text(i), 24));
  }
}

/** A token's text with nothing invisible in it. */
function visibleText(text) {
  return text.replaceAll("\n", "⏎").replaceAll("\t", "→").replaceAll(" ", "·") || "(nothing)";
}
