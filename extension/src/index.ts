import { JupyterFrontEnd, JupyterFrontEndPlugin } from '@jupyterlab/application';
import { ISettingRegistry } from '@jupyterlab/settingregistry';
import { IStatusBar } from '@jupyterlab/statusbar';
import { ITranslator, nullTranslator } from '@jupyterlab/translation';

import { cells } from './cells';
import { StatusModel } from './model';
import { pictures } from './pictures';
import { StatusItem } from './widget';

const PLUGIN_ID = 'labkernel:plugin';
const DEFAULT_INTERVAL_S = 3;

/** The driver and the number of running containers, in the status bar. */
const plugin: JupyterFrontEndPlugin<void> = {
  id: PLUGIN_ID,
  description: 'Shows the driver of the container lab and the number of its running containers.',
  autoStart: true,
  optional: [IStatusBar, ITranslator, ISettingRegistry],
  activate: (
    app: JupyterFrontEnd,
    statusBar: IStatusBar | null,
    translator: ITranslator | null,
    settings: ISettingRegistry | null
  ): void => {
    if (statusBar === null) {
      return;
    }
    const trans = (translator ?? nullTranslator).load('labkernel');
    const model = new StatusModel(app.serviceManager.serverSettings, DEFAULT_INTERVAL_S * 1000);
    const item = new StatusItem(model, trans);
    item.disposed.connect(() => model.dispose());
    statusBar.registerStatusItem(PLUGIN_ID, { item, align: 'left', rank: 90 });
    // Not awaited: a slow settings server must not hold up the application.
    void settings
      ?.load(PLUGIN_ID)
      .then(loaded => {
        const apply = (): void => {
          model.interval = (loaded.get('pollInterval').composite as number) * 1000;
        };
        loaded.changed.connect(apply);
        apply();
      })
      .catch((reason: unknown) => console.warn('labkernel: settings not loaded', reason));
  }
};

export default [plugin, cells, pictures];
