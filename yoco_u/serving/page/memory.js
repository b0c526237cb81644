// What the browser keeps for the page. Where it keeps nothing, because the user forbids it, the page works all the same.

export function recall(storage, name) {
  try {
    return window[storage].getItem(name);
  } catch {
    return null;
  }
}

export function remember(storage, name, value) {
  try {
    window[storage].setItem(name, value);
  } catch {
    // forgotten with the page
  }
}
