// The answer, the player and the linked figures of "Watch it settle". Gradio runs this once, with `element` (the answer's
// place), `props.value` (what view.py made), `watch` and `trigger`. Everything between two solves happens here.

const find = (selector) => element.querySelector(selector);
const sentence = find('.pg-sentence'), weak = find('.pg-weak'), bars = find('.pg-bars');
const slider = find('.pg-player input'), output = find('.pg-player output'), play = find('.pg-play'), stop = find('.pg-stop');
const calm = window.matchMedia('(prefers-reduced-motion: reduce)');
let view = { rows: [] }, at = -1, timer = null;

const put = (tag, parent, text, attributes = {}) => {
  const made = document.createElement(tag);
  made.textContent = text;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return parent.appendChild(made);
};

// Numbers do not break at the end of a line.
const write = (text) => text.split(/([\d.]+e-?\d+|[\d.]+ %)/).forEach((part, order) => put('span', sentence, part, order % 2 ? { class: 'pg-number' } : {}));

// Dark blue over green to yellow, about equally bright steps apart.
const COLOURS = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];
const colour = (share) => {
  const place = Math.min(Math.max(share, 0), 1) * (COLOURS.length - 1), low = Math.min(Math.floor(place), COLOURS.length - 2);
  return COLOURS[low].map((value, channel) => value + (place - low) * (COLOURS[low + 1][channel] - value));
};

const decode = (text) => new Float32Array(Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0)).buffer);

const paint = (canvas, text, [height, width], [low, high], logarithmic) => {
  const scale = logarithmic ? (value) => Math.log(Math.max(value, low)) : (value) => value;
  const span = scale(high) - scale(low) || 1, pixels = new ImageData(width, height);
  decode(text).forEach((value, index) => pixels.data.set([...colour((scale(value) - scale(low)) / span), 255], 4 * index));
  canvas.width = width;
  canvas.height = height;
  canvas.getContext('2d').putImageData(pixels, 0, 0);
};

function drawMaps(row) {
  const place = document.getElementById('pg-maps');
  if (!place) return;
  if (place.querySelectorAll('canvas').length !== 2 * view.grids.length) {
    for (const kind of ['maps', 'changes']) {
      const line = place.querySelector(`[data-maps="${kind}"]`);
      line.replaceChildren();
      for (const [height, width] of view.grids) {
        const cell = put('div', line, '', { class: 'pg-map' });
        put('canvas', cell, '', { role: 'img' });
        put('span', cell, `${height} x ${width}`);
        put('small', cell, '');
      }
    }
  }
  for (const kind of ['maps', 'changes']) {
    place.querySelectorAll(`[data-maps="${kind}"] .pg-map`).forEach((cell, index) => {
      const limits = view.limits[kind][index], grid = view.grids[index], canvas = cell.querySelector('canvas');
      paint(canvas, row[kind][index], grid, limits, kind === 'changes');
      const name = kind === 'maps' ? 'Size of the state' : 'Change of the state';
      canvas.setAttribute('aria-label', `${name} at ${grid[0]} x ${grid[1]} positions, step ${row.step}`);
      cell.querySelector('small').textContent = limits.map((limit) => limit.toPrecision(2)).join(' to ');
    });
  }
}

function moveCursors(index, step) {
  for (const svg of document.querySelectorAll('#pg-curves svg[data-first]')) {
    const cursor = svg.querySelector('.pg-cursor'), x = Number(svg.dataset.first) + (step - 1) * Number(svg.dataset.perStep);
    cursor.setAttribute('x1', x);
    cursor.setAttribute('x2', x);
    cursor.setAttribute('visibility', 'visible');
    const ends = svg.querySelectorAll('.pg-end');
    svg.querySelectorAll('.pg-line').forEach((line, order) => {
      const [cx, cy] = line.getAttribute('points').split(' ')[index].split(',');
      ends[order].setAttribute('cx', cx);
      ends[order].setAttribute('cy', cy);
    });
  }
}

function show(index) {
  at = Math.min(Math.max(index, 0), view.rows.length - 1);
  const row = view.rows[at], last = at === view.rows.length - 1;
  const [best] = row.classes[0], [before, ...after] = row.sentence.split(best);
  sentence.replaceChildren();
  write(before);
  put('strong', sentence, best);
  write(after.join(best));
  weak.textContent = row.weak;
  weak.hidden = !row.weak;
  row.classes.forEach(([label, percent, width], place) => {
    const item = bars.children[place];
    item.children[0].textContent = label;
    item.children[1].textContent = percent;
    item.querySelector('.pg-track span').style.width = `${width}%`;
  });
  slider.max = view.rows.length;
  slider.value = at + 1;
  slider.setAttribute('aria-valuetext', row.sentence);
  output.textContent = `${row.step} of ${view.rows.at(-1).step}`;
  element.dataset.step = row.step;
  drawMaps(row);
  moveCursors(at, row.step);
  if (last) pause();
}

function pause() {
  clearInterval(timer);
  timer = null;
  sentence.setAttribute('aria-live', 'polite');
  play.textContent = 'Play';
}

function start() {
  sentence.setAttribute('aria-live', 'off'); // a screen reader could not keep up
  play.textContent = 'Pause';
  if (at >= view.rows.length - 1) show(0);
  timer = setInterval(() => show(at + 1), calm.matches ? 1200 : 450);
}

// Puts the view where it belongs; a tab that is opened later gets its part then.
function draw() {
  const shown = view.rows.length > 0;
  find('.pg-player').hidden = bars.hidden = !shown;
  for (const place of document.querySelectorAll('[data-needs-answer]')) place.hidden = !shown;
  for (const place of document.querySelectorAll('[data-text]')) place.textContent = view[place.dataset.text] ?? '';
  stop.hidden = !view.running;
  play.disabled = view.running;
  element.dataset.running = view.running;
  element.setAttribute('aria-busy', 'false');
  if (!shown) {
    sentence.replaceChildren(view.message ?? '');
    weak.hidden = true;
    return;
  }
  while (bars.children.length > view.rows[0].classes.length) bars.lastChild.remove();
  while (bars.children.length < view.rows[0].classes.length) {
    const item = put('li', bars, '');
    put('span', item, '', { class: 'pg-label' });
    put('span', item, '', { class: 'pg-percent' });
    put('span', put('span', item, '', { class: 'pg-track', 'aria-hidden': 'true' }), '');
  }
  for (const [name, html] of Object.entries(view.figures)) {
    const place = document.querySelector(`#pg-curves [data-figure="${name}"]`);
    if (place) place.innerHTML = html; // made by plot.py, which escapes what is not its own
  }
  for (const place of document.querySelectorAll('[data-copy="link"]')) place.hidden = !view.link.example;
  Object.assign(document.documentElement.dataset, { link: new URLSearchParams(view.link), python: view.python }); // for page.js
  show(at);
}

function update() {
  const next = props.value ?? { rows: [] };
  // Whoever looks at an earlier step of a solve that goes on stays there.
  const stays = next.run === view.run && at < view.rows.length - 1;
  pause();
  view = next;
  if (!stays) at = view.rows.length - 1;
  draw();
}

slider.addEventListener('input', () => { pause(); show(Number(slider.value) - 1); });
play.addEventListener('click', () => (timer === null ? start() : (pause(), show(at))));
stop.addEventListener('click', () => {
  trigger('stop', { run: view.run });
  if (document.activeElement === stop) slider.focus();
  stop.hidden = true;
});
// Something else is asked for: a solve that still runs is not waited for.
document.addEventListener('pg-turn', () => {
  if (view.running) trigger('retry', { run: view.run });
  element.setAttribute('aria-busy', String(view.rows.length > 0));
});
document.addEventListener('pg-tab-ready', draw);
watch('value', update);
update();

const wanted = new URLSearchParams(window.location.search);
if (wanted.get('example')) trigger('submit', Object.fromEntries(wanted));
