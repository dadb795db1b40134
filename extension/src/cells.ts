import { JupyterFrontEnd, JupyterFrontEndPlugin } from '@jupyterlab/application';
import { IWidgetTracker } from '@jupyterlab/apputils';
import { IEditorLanguageRegistry } from '@jupyterlab/codemirror';
import { ICellModel, INotebook, INotebookTracker, NotebookPanel } from '@jupyterlab/notebook';
import { LanguageSupport, StreamLanguage } from '@codemirror/language';

import { DOCKERFILE_MIME, dockerfile } from './dockerfile';

/** What a cell is written in, by the magic it begins with. */
const LANGUAGES: Record<string, string> = {
  compose: 'text/x-yaml',
  dockerfile: DOCKERFILE_MIME
};
const MAGIC = /^\s*%%([a-z]+)\b/;

/** Highlights cells in the language of their magic: `%%dockerfile` cells as Dockerfiles, `%%compose` ones as YAML. */
export const cells: JupyterFrontEndPlugin<void> = {
  id: 'labkernel:cells',
  description: 'Highlights %%dockerfile cells as Dockerfiles.',
  autoStart: true,
  requires: [INotebookTracker, IEditorLanguageRegistry],
  activate: (
    _app: JupyterFrontEnd,
    tracker: IWidgetTracker<NotebookPanel>,
    languages: IEditorLanguageRegistry
  ): void => {
    languages.addLanguage({
      name: 'labkernel-dockerfile',
      displayName: 'Dockerfile (labkernel)',
      mime: DOCKERFILE_MIME,
      support: new LanguageSupport(StreamLanguage.define(dockerfile))
    });
    tracker.forEach(watchPanel);
    tracker.widgetAdded.connect((_, panel) => watchPanel(panel));
  }
};

function watchPanel(panel: NotebookPanel): void {
  const notebook = panel.content;
  const watched = new WeakSet<ICellModel>();
  const watchAll = (): void => {
    for (const model of notebook.model?.cells ?? []) {
      if (model.type === 'code' && !watched.has(model)) {
        watched.add(model);
        watchCell(model, notebook);
      }
    }
  };
  const watchModel = (): void => {
    watchAll();
    notebook.model?.cells.changed.connect(watchAll);
  };
  notebook.modelChanged.connect(watchModel);
  watchModel();
}

/** The model lives as long as its cell, and its signals with it. */
function watchCell(model: ICellModel, notebook: INotebook): void {
  const update = (): void => {
    const wanted = languageOf(model.sharedModel.getSource());
    const others = Object.values(LANGUAGES);
    if (wanted !== null) {
      model.mimeType = wanted;
    } else if (others.includes(model.mimeType)) {
      model.mimeType = notebook.codeMimetype;
    }
  };
  model.contentChanged.connect(update);
  // The kernel's language is set on all cells when it becomes known.
  model.mimeTypeChanged.connect(update);
  update();
}

function languageOf(source: string): string | null {
  const magic = MAGIC.exec(source);
  return (magic && LANGUAGES[magic[1]]) ?? null;
}
