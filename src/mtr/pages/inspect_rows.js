/** What stands at the later tokens of a character: …², as `mtr.pages.tokens` writes it. */
const PART = /^…[⁰¹²³⁴-⁹]+$/;

/** The list of rows beside the page of one, with a search through all that they say. */
class RowList {
  constructor(rows, texts, choose) {
    Object.assign(this, { rows, texts });
    const find = (id) => document.getElementById(id);
    find("rows").hidden = rows.length < 2;
    document.body.classList.toggle("many", rows.length > 1);
    this.items = rows.map((row, n) => this.#item(row, () => choose(n)));
    find("row-list").replaceChildren(...this.items);
    find("find-row").addEventListener("input", (event) => {
      const wanted = event.target.value.trim().toLowerCase();
      const found = rows.map((row) => !wanted || this.#textOf(row).includes(wanted));
      found.forEach((is, n) => { this.items[n].hidden = !is; });
      const number = found.filter(Boolean).length;
      find("rows-found").textContent = wanted ? `${plain.format(number)} of ${count(rows.length, "row")}` : "";
    });
  }

  mark(number) {
    this.items.forEach((item, n) => {
      const button = item.firstElementChild;
      if (n === number) button.setAttribute("aria-current", "true"); else button.removeAttribute("aria-current");
    });
  }

  #item(row, choose) {
    const tokens = row.num_tokens?.single_pass;
    return make("li", {}, make("button", { type: "button", onclick: choose },
      make("strong", {}, row.index === null ? "row" : `row ${row.index}`), " ",
      make("span", { class: "muted" }, tokens ? count(tokens, "token") : "not trained"),
      make("span", { class: "first" }, row.opening || row.skipped || row.where)));
  }

  #textOf(row) {
    row.text ??= [row.where, row.opening ?? "", row.skipped ?? "", ...(row.turns ?? []).map((turn) => turn.text ?? ""),
      ...(row.trees ?? []).map((tree) => this.#said(tree))].join("\n").toLowerCase();
    return row.text;
  }

  /** The text of all tokens; a character of several stands at its first one. */
  #said(tree) {
    const says = (n, i) => (PART.test(tree.joined[i] ?? "") ? "" : tree.joined[i] ?? this.texts[n]);
    return tree.ids.map(says).join("");
  }
}
