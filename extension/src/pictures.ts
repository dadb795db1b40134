import { JupyterFrontEnd, JupyterFrontEndPlugin } from '@jupyterlab/application';
import { IWidgetTracker } from '@jupyterlab/apputils';
import { ICellModel, INotebookTracker, IOutputModel, NotebookPanel } from '@jupyterlab/notebook';
import { PartialJSONObject, PartialJSONValue } from '@lumino/coreutils';

const WIDGET = 'application/vnd.jupyter.widget-view+json';
/** In an output's metadata: `{ live: key }` from the kernel, and in a saved file also `view`, the widget that was there. */
const OURS = 'labkernel';

interface Bundle {
  data: PartialJSONObject;
  metadata: PartialJSONObject;
}

interface Output extends Bundle {
  output_type: string;
}

/** What a live widget left on the page (labkernel/widgets/monitor.js and dashboard.js): its picture at any moment, by its key. */
declare global {
  interface Window {
    labkernelPictures?: Map<string, () => Bundle | null>;
  }
}

/**
 * A notebook saved while `lab.monitor()` or `lab.dashboard()` is live has its last picture in the file, which any page shows;
 * a widget in a file is an error message wherever its kernel is not. Opened again beside the kernel, it is live again.
 * A server that saves by itself (real-time collaboration) does not ask the page, and keeps the widget.
 */
export const pictures: JupyterFrontEndPlugin<void> = {
  id: 'labkernel:pictures',
  description: 'Saves the last picture of live plots and boards.',
  autoStart: true,
  requires: [INotebookTracker],
  activate: (_app: JupyterFrontEnd, tracker: IWidgetTracker<NotebookPanel>): void => {
    tracker.forEach(watch);
    tracker.widgetAdded.connect((_, panel) => watch(panel));
  }
};

function watch(panel: NotebookPanel): void {
  const model = panel.context.model;
  const plain = model.toJSON.bind(model);
  model.toJSON = () => withPictures(plain());
  const revive = (): void => {
    reviveAll(panel).catch((reason: unknown) => console.warn('labkernel: live outputs not looked for', reason));
  };
  panel.context.sessionContext.kernelChanged.connect(revive);
  void panel.context.ready.then(() => panel.context.sessionContext.ready).then(revive);
}

function withPictures(notebook: PartialJSONValue): PartialJSONValue {
  const cells = (notebook as { cells?: { outputs?: Output[] }[] }).cells ?? [];
  for (const cell of cells) {
    cell.outputs?.forEach((output, index, outputs) => (outputs[index] = still(output)));
  }
  return notebook;
}

/** The output as a file has it: one of ours without its widget, which is remembered in the metadata. */
function still(output: Output): Output {
  const key = (output.metadata?.[OURS] as { live?: string } | undefined)?.live;
  const { [WIDGET]: view, ...data } = output.data ?? {};
  if (key === undefined || view === undefined) {
    return output;
  }
  const picture = window.labkernelPictures?.get(key)?.() ?? { data: {}, metadata: {} };
  const known = { ...data, ...picture.data };
  if (Object.keys(known).every(type => type === 'text/plain')) {
    return output;
  }
  const metadata = { ...output.metadata, ...picture.metadata, [OURS]: { live: key, view } };
  return { ...output, data: known, metadata };
}

async function reviveAll(panel: NotebookPanel): Promise<void> {
  const waiting = [...panel.context.model.cells].flatMap(cell => [...outputsOf(cell)].filter(output => viewOf(output)));
  const kernel = panel.context.sessionContext.session?.kernel;
  if (!waiting.length || !kernel) {
    return;
  }
  const { content } = await kernel.requestCommInfo({ target_name: 'jupyter.widget' });
  const comms: object = content.status === 'ok' ? content.comms : {};
  for (const output of waiting) {
    const view = viewOf(output);
    if (view && !panel.isDisposed && view.model_id in comms) {
      output.setData({ data: { ...output.data, [WIDGET]: view } as PartialJSONObject });
    }
  }
}

function* outputsOf(cell: ICellModel): Iterable<IOutputModel> {
  for (let index = 0; index < (cell.outputs?.length ?? 0); index++) {
    yield cell.outputs!.get(index);
  }
}

/** The widget of an output that was saved as a picture. */
function viewOf(output: IOutputModel): { model_id: string } | null {
  const ours = output.metadata[OURS] as { view?: { model_id: string } } | undefined;
  return (output.data[WIDGET] === undefined && ours?.view) || null;
}
