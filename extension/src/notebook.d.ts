/**
 * What cells.ts uses of @jupyterlab/notebook. JupyterLab shares that package with every extension, so nothing of it has to
 * be installed to build this one: with its dependencies it is ten times the size of all others together.
 */
declare module '@jupyterlab/notebook' {
  import { DocumentRegistry, IDocumentWidget } from '@jupyterlab/docregistry';
  import { IWidgetTracker } from '@jupyterlab/apputils';
  import { Token } from '@lumino/coreutils';
  import { ISignal } from '@lumino/signaling';
  import { Widget } from '@lumino/widgets';

  export interface ICellModel {
    readonly type: string;
    mimeType: string;
    readonly sharedModel: { getSource(): string };
    readonly contentChanged: ISignal<ICellModel, void>;
    readonly mimeTypeChanged: ISignal<ICellModel, unknown>;
  }

  export interface ICellList extends Iterable<ICellModel> {
    readonly changed: ISignal<ICellList, unknown>;
  }

  export interface INotebookModel extends DocumentRegistry.IModel {
    readonly cells: ICellList;
  }

  export interface INotebook extends Widget {
    readonly model: INotebookModel | null;
    readonly modelChanged: ISignal<INotebook, void>;
    readonly codeMimetype: string;
  }

  export type NotebookPanel = IDocumentWidget<INotebook, INotebookModel>;

  export const INotebookTracker: Token<IWidgetTracker<NotebookPanel>>;
}
