'use strict';
// Shows one pair after another and sends what the reviewer says of it. What models wrote is only ever set as text.
(() => {
  const at = id => document.getElementById(id);
  const KEYS = {
    arrowleft: 'left', a: 'left', 1: 'left',
    arrowright: 'right', b: 'right', 2: 'right',
    t: 'tie', '=': 'tie', 3: 'tie',
    s: 'skip', 4: 'skip',
  };
  const SAID = { left: 'Kept: A', right: 'Kept: B', tie: 'Kept: about the same', skip: 'Kept: cannot tell' };
  const buttons = [...document.querySelectorAll('[data-verdict]')];
  let state = null;
  let busy = false;

  // A request at a time; while it is under way, keys and buttons do nothing.
  async function ask(name, body) {
    if (busy) return false;
    busy = true;
    try {
      const options = body && {
        method: 'POST', headers: { 'Content-Type': 'application/json' }, body: JSON.stringify(body),
      };
      const response = await fetch(name, options || {}).catch(() => {
        throw new Error('The review does not answer: it was ended, or started again at another address. '
          + (body ? 'Your last key was not kept.' : ''));
      });
      const answer = await response.json();
      if (response.ok) state = answer;
      else if (response.status === 409) state = await (await fetch('state')).json();  // Judged in another window.
      else throw new Error(`Not kept: ${answer.error}.`);
      at('problem').hidden = true;
      show();
      return response.ok;
    } catch (error) {
      at('problem').textContent = error.message;
      at('problem').hidden = false;
      return false;
    } finally {
      busy = false;
    }
  }

  function show() {
    const pair = state.pair;
    at('meta').textContent = `${state.run} · ${state.reviewer} · ${state.done} of ${state.total} judged`;
    at('progress').max = state.total;
    at('progress').value = state.done;
    at('pair').hidden = at('verdicts').hidden = at('noting').hidden = !pair;
    at('end').hidden = !!pair;
    at('bar').hidden = false;
    at('undo').disabled = !state.can_undo;
    if (!pair) return;
    for (const name of ['trait', 'statement', 'prompt']) at(name).textContent = pair[name];
    for (const side of ['left', 'right']) {
      const empty = !pair[side].text.trim();
      at(side).textContent = empty ? '(nothing)' : pair[side].text;
      at(side).classList.toggle('nothing', empty);
      at(`cut-${side}`).hidden = !pair[side].cut_off;
    }
    at('note').value = pair.note;
    window.scrollTo(0, 0);
  }

  async function judge(verdict) {
    if (!state || !state.pair) return;
    const note = at('note').value;
    if (await ask('verdict', { pair: state.pair.id, verdict, note })) at('status').textContent = SAID[verdict];
  }

  async function undo() {
    if (!state || !state.can_undo) return;
    if (await ask('undo', {})) at('status').textContent = 'Taken back';
  }

  for (const button of buttons) button.addEventListener('click', () => judge(button.dataset.verdict));
  at('undo').addEventListener('click', undo);
  at('note').addEventListener('keydown', event => {
    if (event.key === 'Escape' || (event.key === 'Enter' && !event.shiftKey && !event.isComposing)) {
      event.preventDefault();
      at('note').blur();
    }
    event.stopPropagation();
  });
  document.addEventListener('keydown', event => {
    const key = event.key.toLowerCase();
    // A key that is held down judges one pair, and the browser's own shortcuts stay its own.
    if (event.repeat || event.altKey || event.metaKey) return;
    if (event.ctrlKey ? key === 'z' : key === 'u' || key === 'backspace') undo();
    else if (event.ctrlKey) return;
    else if (key === 'n' && state && state.pair) at('note').focus();
    else if (Object.hasOwn(KEYS, key)) judge(KEYS[key]);
    else return;
    event.preventDefault();
  });
  ask('state');
})();
