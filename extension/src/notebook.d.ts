/**
 * What cells.ts and pictures.ts use of @jupyterlab/notebook. JupyterLab shares that package with every extension, so nothing of it has to
 * be installed to build this one: with its dependencies it is ten times the size of all others together.
 */
declare module '@jupyterlab/notebook' {
  import { DocumentRegistry, IDocumentWidget } from '@jupyterlab/docregistry';
  import { IWidgetTracker } from '@jupyterlab/apputils';
  import { PartialJSONObject, Token } from '@lumino/coreutils';
  import { ISignal } from '@lumino/signaling';
  import { Widget } from '@lumino/widgets';

  export interface IOutputModel {
    readonly data: PartialJSONObject;
    readonly metadata: PartialJSONObject;
    setData(options: { data?: PartialJSONObject; metadata?: PartialJSONObject }): void;
  }

  export interface ICellModel {
    readonly type: string;
    /** Only code cells have them. */
    readonly outputs?: { readonly length: number; get(index: number): IOutputModel };
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
