'use strict';
// Filter, search and order the replies. Without this script the page shows all of them, grouped by trait.
(() => {
  const section = document.getElementById('replies');
  const controls = section && section.querySelector('.controls');
  if (!controls) return;
  const SHOWN = 3;
  const groups = [...section.querySelectorAll('.group')];
  const links = [...section.querySelectorAll('.filter a')];
  const search = controls.querySelector('input');
  const order = controls.querySelector('select');
  const status = controls.querySelector('output');
  const items = new Map(groups.map(group => [group, [...group.querySelectorAll('.exchange')]]));
  let chosen = 'replies';

  const change = item => item.dataset.change === undefined ? -Infinity : Number(item.dataset.change);
  const orders = {
    file: () => 0,
    gain: (a, b) => change(b) - change(a),
    loss: (a, b) => (change(a) === -Infinity) - (change(b) === -Infinity) || change(a) - change(b),
  };

  function show() {
    const wanted = search.value.trim().toLocaleLowerCase();
    let count = 0;
    for (const group of groups) {
      const found = items.get(group)
        .filter(item => !wanted || item.textContent.toLocaleLowerCase().includes(wanted))
        .sort(orders[order.value]);
      const selected = chosen === 'replies' || chosen === group.id;
      group.hidden = !selected || !found.length;
      if (selected) count += found.length;
      group.querySelector('.first').replaceChildren(...found.slice(0, SHOWN));
      const rest = group.querySelector('.rest');
      const more = found.slice(SHOWN);
      rest.hidden = !more.length;
      rest.querySelector('summary').textContent = `${more.length} more`;
      rest.querySelector('div').replaceChildren(...more);
      if (wanted) rest.open = true;
    }
    for (const link of links) {
      if (link.hash === '#' + chosen) link.setAttribute('aria-current', 'true');
      else link.removeAttribute('aria-current');
    }
    status.textContent = `${count} message${count === 1 ? '' : 's'}`;
  }

  function follow() {
    const id = location.hash.slice(1);
    // What a search hides is not in the document; most exchanges have no id.
    const target = document.getElementById(id) || [...items.values()].flat().find(item => id && item.id === id);
    if (!target) return;
    if (links.some(link => link.hash === '#' + id)) chosen = id;
    else if (section.contains(target) || [...items.values()].flat().includes(target)) {
      chosen = 'replies';
      search.value = '';
    }
    show();
    // What is folded away is unfolded.
    for (let part = target; part; part = part.parentElement) {
      if (part.matches('details')) part.open = true;
    }
    target.scrollIntoView();
  }

  for (const link of links) {
    link.addEventListener('click', event => {
      event.preventDefault();
      chosen = link.hash.slice(1);
      show();
    });
  }
  search.addEventListener('input', show);
  order.addEventListener('change', show);
  window.addEventListener('hashchange', follow);
  // A link to where the address points already changes no hash.
  document.addEventListener('click', event => {
    const link = event.target.closest?.('a[href^="#"]');
    if (link && link.hash === location.hash && !links.includes(link)) follow();
  });
  controls.hidden = false;
  show();
  follow();
})();
