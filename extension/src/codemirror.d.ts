/** What is used of two packages that JupyterLab shares with every extension (see notebook.d.ts). */
declare module '@codemirror/language' {
  export interface StringStream {
    readonly string: string;
    readonly pos: number;
    sol(): boolean;
    peek(): string | undefined;
    next(): string | void;
    eatSpace(): boolean;
    skipToEnd(): void;
    match(pattern: RegExp): RegExpMatchArray | null;
    current(): string;
  }

  export interface StreamParser<State> {
    name?: string;
    startState?(indentUnit: number): State;
    token(stream: StringStream, state: State): string | null;
    languageData?: Record<string, unknown>;
  }

  export class StreamLanguage<State> {
    static define<State>(parser: StreamParser<State>): StreamLanguage<State>;
  }

  export class LanguageSupport {
    constructor(language: StreamLanguage<unknown>);
  }
}

declare module '@jupyterlab/codemirror' {
  import { LanguageSupport } from '@codemirror/language';
  import { Token } from '@lumino/coreutils';

  export interface IEditorLanguageRegistry {
    addLanguage(language: {
      name: string;
      displayName?: string;
      mime: string;
      support?: LanguageSupport;
    }): void;
  }

  export const IEditorLanguageRegistry: Token<IEditorLanguageRegistry>;
}
