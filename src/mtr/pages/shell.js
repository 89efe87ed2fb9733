"use strict";
/** What `page(..., data=...)` was given. */
function pageData() {
  const element = document.getElementById("data");
  return element ? JSON.parse(element.textContent) : null;
}

/** An element; text is only ever set as text, so nothing in the data becomes markup. */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "class") element.className = value;
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

/** A colour of shell.css as the canvas understands it, in the theme that is shown now. */
function colour(name) {
  const probe = document.getElementById("probe") || document.body.appendChild(make("i", { id: "probe", hidden: true }));
  probe.style.color = `var(--${name})`;
  return getComputedStyle(probe).color;
}

(() => {
  const button = document.getElementById("theme");
  const root = document.documentElement;
  const order = ["system", "light", "dark"];
  const current = () => root.dataset.theme || "system";
  const label = () => { button.textContent = `Theme: ${current()}`; };
  const announce = () => root.dispatchEvent(new CustomEvent("themechange"));
  button.addEventListener("click", () => {
    const next = order[(order.indexOf(current()) + 1) % order.length];
    if (next === "system") delete root.dataset.theme; else root.dataset.theme = next;
    try { localStorage.setItem("mtr-theme", next); } catch { /* the choice then holds for this page only */ }
    label();
    announce();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", announce);
  label();
})();
