//! Hints between two servers, of which most are lost, with every other seed all; the rest come late, and some of them twice.

use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use ossicle::bus::{Bus, Hint};
use tokio::sync::mpsc;
use tokio::time::sleep;

use crate::dice::Dice;
use crate::party::{Shared, lock};

/// One end.
#[derive(Debug)]
struct End {
    /// Of a hundred hints, so many are lost.
    lost: usize,
    dice: Mutex<Dice>,
    to: mpsc::UnboundedSender<Hint>,
    heard: tokio::sync::Mutex<mpsc::UnboundedReceiver<Hint>>,
}

/// The two ends of a bus that is made anew.
pub(crate) fn new(seed: u64, book: &Shared) -> [Arc<dyn Bus>; 2] {
    let started = lock(book).now.as_millis() as u64;
    let (here, there) = (mpsc::unbounded_channel(), mpsc::unbounded_channel());
    let end = |to, heard, place: u64| -> Arc<dyn Bus> {
        let lost = if Dice::new(seed, 7).chance(50) { 100 } else { 60 };
        let dice = Mutex::new(Dice::new(seed ^ (started << 20), 5 + place));
        Arc::new(End { lost, dice, to, heard: tokio::sync::Mutex::new(heard) })
    };
    [end(here.0, there.1, 0), end(there.0, here.1, 1)]
}

#[async_trait]
impl Bus for End {
    fn alone(&self) -> bool {
        false
    }

    fn hint(&self, hint: Hint) {
        let mut dice = self.dice.lock().unwrap();
        if dice.chance(self.lost) {
            return;
        }
        for _ in 0..if dice.chance(20) { 2 } else { 1 } {
            let (to, after) = (self.to.clone(), dice.millis(0, 1000));
            tokio::spawn(async move {
                sleep(after).await;
                // The other server may have stopped.
                let _ = to.send(hint);
            });
        }
    }

    async fn heard(&self) -> Hint {
        match self.heard.lock().await.recv().await {
            Some(hint) => hint,
            None => core::future::pending().await,
        }
    }
}
