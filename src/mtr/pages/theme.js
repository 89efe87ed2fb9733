// Runs before the first paint, so that a page chosen to be dark never flashes white.
(() => {
  let chosen = "system";
  try { chosen = localStorage.getItem("mtr-theme") || "system"; } catch { /* a page of a file may have no storage */ }
  if (chosen !== "system") document.documentElement.dataset.theme = chosen;
})();
