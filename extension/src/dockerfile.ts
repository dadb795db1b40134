import { StreamParser, StringStream } from '@codemirror/language';

/** The language of `%%dockerfile` cells: JupyterLab's own Dockerfile mode knows instructions, strings and comments only. */
export const DOCKERFILE_MIME = 'text/x-labkernel-dockerfile';

const INSTRUCTIONS = new Set(
  ('ADD ARG CMD COPY ENTRYPOINT ENV EXPOSE FROM HEALTHCHECK LABEL MAINTAINER ONBUILD RUN SHELL STOPSIGNAL USER VOLUME ' +
    'WORKDIR').split(' ')
);
/** Those whose words after them are an instruction again, or their own sub-command. */
const NESTING = new Set(['ONBUILD', 'HEALTHCHECK']);
/** Where `<<NAME` begins a text on the lines below. */
const WITH_TEXT = new Set(['ADD', 'COPY', 'RUN']);

type Word = 'instruction' | 'image' | 'as' | 'stage' | 'other';

interface State {
  instruction: string;
  /** What the next word is. */
  word: Word;
  /** The instruction goes on in the next line. */
  continued: boolean;
  escape: string;
  /** Of the here-documents that begin below this line: the end, and before it a `-` where tabs may precede it. */
  pending: string[];
  /** Still before the first instruction, where `# syntax=` and the cell's magic stand. */
  top: boolean;
  /** In the text of a here-document. */
  inText: boolean;
  /** In the value of a flag. */
  inValue: boolean;
  /** In the image after FROM, which may be made of names and variables. */
  inImage: boolean;
}

export const dockerfile: StreamParser<State> = {
  name: 'labkernel-dockerfile',
  startState: () => ({
    instruction: '',
    word: 'instruction',
    continued: false,
    escape: '\\',
    pending: [],
    top: true,
    inText: false,
    inValue: false,
    inImage: false
  }),
  token: (stream, state) => {
    if (stream.sol()) {
      const whole = lineToken(stream, state);
      if (whole !== undefined) {
        return whole;
      }
    }
    if (stream.eatSpace()) {
      state.word = state.inImage ? 'as' : state.word;
      state.inValue = state.inImage = false;
      return null;
    }
    if (stream.peek() === state.escape && /^.\s*$/.test(stream.string.slice(stream.pos))) {
      stream.skipToEnd();
      state.continued = true;
      return 'operator';
    }
    return wordToken(stream, state);
  },
  languageData: { commentTokens: { line: '#' } }
};

/** What a line is as a whole, undefined where its words have to be looked at. */
function lineToken(stream: StringStream, state: State): string | null | undefined {
  state.inText ||= state.pending.length > 0;
  if (state.inText) {
    const [, dash, end] = /^(-?)(.*)$/.exec(state.pending[0])!;
    const text = stream.string;
    stream.skipToEnd();
    if ((dash ? text.replace(/^\t+/, '') : text) === end) {
      state.pending.shift();
      state.inText = state.pending.length > 0;
      return 'def';
    }
    return 'string';
  }
  if (state.top && stream.match(/^%%.*/)) {
    return 'meta';
  }
  if (stream.match(/^\s*#.*/)) {
    const directive = /^\s*#\s*(syntax|escape|check)\s*=\s*(\S+)/i.exec(stream.string);
    if (!directive || !state.top) {
      return 'comment';
    }
    if (directive[1].toLowerCase() === 'escape') {
      state.escape = directive[2][0];
    }
    return 'meta';
  }
  if (!/\S/.test(stream.string)) {
    return undefined;
  }
  if (!state.continued) {
    state.word = 'instruction';
    state.instruction = '';
    state.top = false;
  }
  state.inValue = state.inImage = state.continued = false;
  return undefined;
}

function wordToken(stream: StringStream, state: State): string | null {
  if (stream.match(/^\$(\{[^}]*\}|\w+)/)) {
    state.inImage ||= state.word === 'image' && !state.inValue;
    return 'variable-2';
  }
  if (stream.match(/^"(\\.|[^"\\])*"?/) || stream.match(/^'[^']*'?/)) {
    return 'string';
  }
  if (state.instruction && state.word !== 'stage' && stream.match(/^--[a-z][a-z-]*=?/)) {
    const flag = stream.current();
    state.word = flag === '--from=' ? 'stage' : state.word;
    state.inValue = flag.endsWith('=') && flag !== '--from=';
    return 'attribute';
  }
  if (WITH_TEXT.has(state.instruction)) {
    const text = stream.match(/^<<(-?)(["']?)([^\s"'<>|&;-][^\s"'<>|&;]*)\2/);
    if (text) {
      state.pending.push(text[1] + text[3]);
      return 'def';
    }
  }
  if (!stream.match(state.word === 'other' ? /^[\w.\-/:@]+/ : /^[^\s$"']+/)) {
    stream.next();
    return null;
  }
  return state.inValue ? null : nameToken(stream.current(), state);
}

function nameToken(word: string, state: State): string | null {
  const upper = word.toUpperCase();
  switch (state.word) {
    case 'instruction':
      if (!INSTRUCTIONS.has(upper) && !(state.instruction === 'HEALTHCHECK' && upper === 'NONE')) {
        state.word = 'other';
        return 'error';
      }
      state.instruction = upper;
      state.word = upper === 'FROM' ? 'image' : NESTING.has(upper) ? 'instruction' : 'other';
      return 'keyword';
    case 'image':
      state.inImage = true;
      return 'tag';
    case 'as':
      state.word = upper === 'AS' ? 'stage' : 'other';
      return upper === 'AS' ? 'keyword' : null;
    case 'stage':
      state.word = 'other';
      return 'def';
    default:
      return null;
  }
}
