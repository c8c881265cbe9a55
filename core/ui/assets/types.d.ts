// Types of the page's scripts, for `tsc` alone; nothing here is served.

/** What the visitor has chosen. */
interface IdState {
  word: string | null;
  /** The denoising step, from 0. */
  step: number | null;
  /** Of the overlay, in percent. */
  opacity: number;
  /** Whether all words share one scale. */
  common: boolean;
  /** Whether the map of what an edit changed lies on the image. */
  changes: boolean;
  /** Whether the original is shown in place of the edited image. */
  before: boolean;
  /** Whether the error curves are unfolded. */
  curves: boolean;
  /** Selector of the element with the keyboard focus. */
  focus: string | null;
}

/** An image shown on the viewer's image; `scale` is that of signed bits. */
interface Overlay {
  src: string;
  tag: string;
  scale?: { top: string };
}

/** An element as the scripts find it by its class; they know which kind it is. */
type Found = { closest(selector: string): Found | null; open: boolean } & HTMLElement &
  HTMLInputElement & HTMLImageElement & HTMLCanvasElement;

/** What page.js offers to the tabs' scripts and, from `overlays` on, what they register, by the tab's name. */
interface IdPage {
  state: IdState;
  /** The parameters that the page was opened with. */
  query: URLSearchParams;
  one(selector: string, root?: ParentNode): Found | null;
  all(selector: string, root?: ParentNode): Found[];
  /** Sets a property only if it changes, so that observers come to rest. */
  set(element: any, name: string, value: unknown): void;
  /** Sets an attribute only if it changes. */
  attribute(element: Element | null, name: string, value: string): void;
  target(event: Event): Found;
  apply(): void;
  /** The name of the open tab. */
  openTab(): string;
  /** Writes into a field as if it were typed. */
  type(field: HTMLInputElement, value: string): void;
  /** The address that restores what is shown; null if it cannot be restored. */
  address(): string | null;
  remember(): void;
  chooseStep(step: number): void;
  chooseWord(word: string): void;
  chosenWord(): string | null;
  overlays: Record<string, () => Overlay | null>;
  /** An image that a tab shows in place of the original. */
  bases: Record<string, () => { src: string, tag: string } | null>;
  /** What a screen reader is told about a place on the image; x and y in 0..1. */
  spoken: Record<string, (x: number, y: number) => string>;
  /** What a click on the image means; x and y in 0..1. */
  clicks: Record<string, (x: number, y: number) => void>;
  /** Parameters that a tab adds to the address. */
  parameters: Record<string, () => Record<string, string | number>>;
  /** The whole query of a tab that has its own. */
  addresses: Record<string, () => string | null>;
  /** Called after every change with the name of the open tab. */
  watchers: ((tab: string) => void)[];
  /** Called after the server has changed the page, once `watchers` were. */
  changes: (() => void)[];
  /** Raise events of Gradio components; set once these are there. */
  ask?(question: string, data?: Record<string, string>): void;
  openConcept?(site: string, number: string | number): void;
  /** Puts a concept into the form of the Interventions tab. */
  steer?(site: string, number: string): void;
  point?(x: number, y: number, step: number | null): void;
  /** An object is dragged from one place on the image to another; all in 0..1. */
  drag?(x0: number, y0: number, x1: number, y1: number): void;
}

interface Window {
  idPage: IdPage;
}

/** The words that a model knows, as by backend/wordlist.py. */
interface Wordlist {
  objects: { words: string[], swaps: string[] }[];
  backgrounds: { words: string[], preposition: string }[];
  styles: string[];
  relations: string[];
}

/** A concept at a block and branch. */
interface ConceptRef {
  site: string;
  number: number;
}

/** The activations at one block and branch, packed as by concepts/results.py. */
interface SiteCodes {
  grid: [number, number];
  /** Concepts per position. */
  each: number;
  numbers: string;
  levels: string;
  /** By number: label, kind, mean, 99th percentile, usual share of all activation, whether the label fits well. */
  names: Record<string, [string, string, number, number, number, number]>;
}

/** A concept, or several with one label, in the list of what is active. */
interface ActiveItem {
  number: number;
  /** Of all activation. */
  share: number;
  /** How many times its usual share that is. */
  times: number;
  /** What it adds to how unusual this picture is. */
  excess: number;
  /** How many concepts with this label are active. */
  members: number;
}

interface ConceptData {
  steps: number;
  colours: string[];
  sites: Record<string, SiteCodes>;
}

/** Label maps of all steps, one character per cell, as by layout/results.py. */
interface LayoutMap {
  grid: [number, number];
  cells: string;
  /** Cells of one step; added here. */
  size?: number;
}

interface LayoutData {
  classes: string[];
  colours: string[];
  /** Classes named in the prompt. */
  objects: string[];
  readouts: Record<string, LayoutMap>;
}
