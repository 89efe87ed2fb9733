/* The charts of `mtr report` side by side, what they share, and the filters of the played conversations. */

(() => {
  const { runs, charts } = pageData();
  const grid = document.getElementById("charts");
  const view = {
    several: runs.length > 1, x: "step", smoothing: 0, cursor: null, hidden: new Set(),
    read(cursor) {
      view.cursor = cursor;
      for (const chart of drawn) chart.read();
    },
  };
  const drawn = charts.map((spec) => new Chart(spec, runs, view));
  const render = () => drawn.forEach((chart) => chart.render());

  function setUpControls() {
    for (const radio of document.querySelectorAll('input[name="x-axis"]')) {
      radio.addEventListener("change", () => {
        view.x = radio.value;
        view.cursor = null;
        render();
      });
    }
    const slider = document.getElementById("smoothing");
    const longest = Math.max(0, ...runs.map((run) => (run.series.loss ? run.series.loss.step.length : 0)));
    slider.value = longest >= 200 ? 7 : longest >= 40 ? 4 : 0;
    const smooth = () => {
      view.smoothing = Number(slider.value) ? 1 - 0.5 ** (Number(slider.value) / 2) : 0;
      const text = Number(slider.value) ? slider.value : "off";
      document.getElementById("smoothing-value").textContent = text;
      slider.setAttribute("aria-valuetext", text);
    };
    slider.addEventListener("input", () => { smooth(); render(); });
    smooth();
    for (const box of document.querySelectorAll("input.show-run")) {
      box.addEventListener("change", () => {
        const index = Number(box.value);
        if (box.checked) view.hidden.delete(index); else view.hidden.add(index);
        render();
      });
    }
  }

  function setUpPlayed() {
    const filter = document.getElementById("played-filter");
    if (!filter) return;
    const count = document.getElementById("played-count");
    const chats = [...document.querySelectorAll("details.chat")];
    const apply = () => {
      let shown = 0;
      for (const chat of chats) {
        let some = false;
        for (const turn of chat.querySelectorAll(".turn")) {
          const fits = filter.value === "all" || turn.dataset.kinds.split(" ").includes(filter.value);
          turn.hidden = !fits;
          some ||= fits;
          shown += fits;
        }
        chat.hidden = !some;
        if (some && filter.value !== "all") chat.open = true;
      }
      count.textContent = `${shown} ${shown === 1 ? "turn" : "turns"}`;
    };
    filter.addEventListener("change", apply);
    apply();
    const thinking = document.getElementById("all-thinking");
    thinking.addEventListener("click", () => {
      const open = thinking.getAttribute("aria-pressed") !== "true";
      thinking.setAttribute("aria-pressed", String(open));
      for (const one of document.querySelectorAll("details.thinking")) one.open = open;
    });
  }

  if (grid) {
    setUpControls();
    grid.append(...drawn.map((chart) => chart.element));
    let width = 0;
    new ResizeObserver(() => {
      if (grid.clientWidth === width) return;
      width = grid.clientWidth;
      render();
    }).observe(grid);
    width = grid.clientWidth;
    render();
  }
  setUpPlayed();
})();
