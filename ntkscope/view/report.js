// Draws the figures of the report, gives them controls that a keyboard can reach, and follows the page's light or dark colours.
(function () {
  "use strict";
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const LIGHT = { text: "#3d454e", grid: "rgba(60,70,80,0.18)", scene: "#d3d8de", line: "#8a939c", hover: "#ffffff", page: "#ffffff" };
  const DARK = { text: "#c3cad2", grid: "rgba(200,210,220,0.17)", scene: "#39424c", line: "#77818c", hover: "#262c33", page: "#14171b" };
  const NARROW = 600; // pixels; no room for plotly's own buttons
  const WIDE_ENOUGH = 1.45; // width over height at which a scene shows whole
  const plots = [];

  // Settings of plotly's layout that depend on the page's colours.
  function coloured(layout, theme) {
    const changes = { "font.color": theme.text, "hoverlabel.bgcolor": theme.hover, "hoverlabel.font.color": theme.text, "hoverlabel.bordercolor": theme.line, "modebar.color": theme.line, "modebar.activecolor": theme.text };
    for (const key of Object.keys(layout)) {
      if (/^[xy]axis\d*$/.test(key)) {
        changes[key + ".gridcolor"] = theme.grid;
        changes[key + ".linecolor"] = theme.line;
      } else if (/^scene\d*$/.test(key)) {
        for (const axis of ["xaxis", "yaxis", "zaxis"]) {
          changes[key + "." + axis + ".color"] = theme.text;
          changes[key + "." + axis + ".gridcolor"] = theme.scene;
          changes[key + "." + axis + ".zerolinecolor"] = theme.line;
        }
      }
    }
    return changes;
  }

  function assign(target, path, value) {
    const keys = path.split(".");
    const last = keys.pop();
    for (const key of keys) target = target[key] = target[key] || {};
    target[last] = value;
  }

  function element(tag, properties, ...children) {
    const made = Object.assign(document.createElement(tag), properties);
    made.append(...children);
    return made;
  }

  function timeControls(plot, slider, menu) {
    const label = slider.currentvalue.prefix.trim();
    const output = element("output", { value: slider.steps[slider.active].label });
    const range = element("input", { type: "range", min: 0, max: slider.steps.length - 1, step: 1, value: slider.active });
    range.setAttribute("aria-valuetext", label + " " + output.value);
    let timer = null;
    const button = element("button", { type: "button", textContent: "Play" });
    function show(position) {
      const step = slider.steps[position];
      range.value = position;
      output.value = step.label;
      range.setAttribute("aria-valuetext", label + " " + step.label);
      return Plotly.animate(plot, step.args[0], step.args[1]);
    }
    function pause() {
      clearTimeout(timer);
      timer = null;
      button.textContent = "Play";
    }
    function advance() {
      const next = Number(range.value) + 1;
      if (next >= slider.steps.length) return pause();
      show(next).then(function () { if (timer !== null) timer = setTimeout(advance, menu.buttons[0].args[1].frame.duration); }, pause);
    }
    range.addEventListener("input", function () { pause(); show(Number(range.value)).catch(function () {}); });
    button.addEventListener("click", function () {
      if (timer !== null) return pause();
      if (Number(range.value) >= slider.steps.length - 1) range.value = -1;
      button.textContent = "Pause";
      timer = setTimeout(advance, 0);
    });
    return [button, element("label", { className: "time" }, label, range, output)];
  }

  function choice(plot, menu) {
    const select = element("select", {}, ...menu.buttons.map(function (entry) {
      return element("option", { textContent: entry.label.replace(/^colour: /, "") });
    }));
    select.addEventListener("change", function () {
      const args = menu.buttons[select.selectedIndex].args;
      Plotly.update(plot, args[0], args[1], args[2]);
    });
    return element("label", {}, "colour by", select);
  }

  function turnButtons(plot) {
    function turn(angle) {
      const eye = plot._fullLayout.scene.camera.eye;
      const x = eye.x * Math.cos(angle) - eye.y * Math.sin(angle);
      const y = eye.x * Math.sin(angle) + eye.y * Math.cos(angle);
      Plotly.relayout(plot, { "scene.camera.eye": { x: x, y: y, z: eye.z } });
    }
    return [["Turn left", 0.35], ["Turn right", -0.35]].map(function (entry) {
      const button = element("button", { type: "button", textContent: entry[0] });
      button.addEventListener("click", function () { turn(entry[1]); });
      return button;
    });
  }

  function draw(figure) {
    const spec = JSON.parse(figure.querySelector("script[type='application/json']").textContent);
    const plot = figure.querySelector(".plot");
    const controls = figure.querySelector(".controls");
    const layout = spec.layout;
    const sliders = layout.sliders || [];
    const menus = layout.updatemenus || [];
    delete layout.sliders;
    delete layout.updatemenus;
    layout.autosize = true;
    layout.margin.t = 34;
    const width = plot.clientWidth;
    if (layout.scene) {
      if (width < NARROW) for (const axis of ["xaxis", "yaxis", "zaxis"]) layout.scene[axis].title.font.size = 10;
      // A narrow scene is cut at its sides: make it lower, and step back.
      layout.height = Math.min(layout.height, Math.max(380, 0.95 * width));
      plot.style.minHeight = layout.height + "px";
      const back = Math.max(1, WIDE_ENOUGH * layout.height / width);
      const eye = layout.scene.camera.eye;
      layout.scene.camera.eye = { x: eye.x * back, y: eye.y * back, z: eye.z * back };
    }
    const changes = coloured(layout, dark.matches ? DARK : LIGHT);
    for (const path of Object.keys(changes)) assign(layout, path, changes[path]);
    const config = {
      responsive: true,
      displaylogo: false,
      displayModeBar: width < NARROW ? false : "hover",
      showSendToCloud: false, // plotly's default sends the data away at one click
      modeBarButtonsToRemove: ["select2d", "lasso2d", "tableRotation"],
    };
    return Plotly.newPlot(plot, spec.data, layout, config).then(function () {
      if (spec.frames && spec.frames.length) return Plotly.addFrames(plot, spec.frames);
    }).then(function () {
      const colour = menus.find(function (menu) { return menu.name === "colour"; });
      const play = menus.find(function (menu) { return menu.name === "play"; });
      if (sliders.length && play) controls.append(...timeControls(plot, sliders[0], play));
      if (colour) controls.append(choice(plot, colour));
      if (layout.scene) controls.append(...turnButtons(plot));
      plots.push(plot);
      figure.dataset.drawn = "true";
      figure.dispatchEvent(new CustomEvent("drawn", { bubbles: true, detail: { plot: plot } }));
    });
  }

  function recolour(theme) {
    return Promise.all(plots.map(function (plot) { return Plotly.relayout(plot, coloured(plot.layout, theme)); }));
  }

  dark.addEventListener("change", function () { recolour(dark.matches ? DARK : LIGHT); });
  window.addEventListener("beforeprint", function () { recolour(LIGHT); });
  window.addEventListener("afterprint", function () { recolour(dark.matches ? DARK : LIGHT); });

  // What is near the reader's eyes comes first, then what is quickly drawn; scenes cost most.
  function urgency(figure) {
    const box = figure.getBoundingClientRect();
    if (box.bottom > -innerHeight && box.top < 2 * innerHeight) return 0;
    return figure.dataset.scene ? 2 : 1;
  }

  function idle() {
    return new Promise(function (resolve) {
      if (window.requestIdleCallback) requestIdleCallback(resolve, { timeout: 300 });
      else setTimeout(resolve, 20);
    });
  }

  // One after the other, with a pause for the page to scroll and react in between.
  async function drawAll() {
    const waiting = [...document.querySelectorAll("figure[data-figure]")];
    while (waiting.length) {
      let next = 0;
      for (let k = 1; k < waiting.length; k++) if (urgency(waiting[k]) < urgency(waiting[next])) next = k;
      const [figure] = waiting.splice(next, 1);
      try {
        await draw(figure);
      } catch (error) {
        figure.querySelector(".plot").textContent = "This figure could not be drawn here: " + error.message;
        console.error(error);
      }
      performance.mark("drawn " + figure.dataset.figure);
      await idle();
      if (!performance.getEntriesByName("interactive").length) performance.mark("interactive"); // a figure is there, and the page has answered
    }
    document.documentElement.dataset.drawn = "true";
  }
  drawAll();
})();
