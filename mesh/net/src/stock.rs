//! Sockets created in advance in a pod's namespace, so that a worker connects without a thread hop.
//!
//! There is one stock per pod. The helper thread of [`netns`](crate::netns) refills it in batches when it runs
//! low. It grows with demand up to [`MAX_STOCK`] and shrinks to one socket when it is not used.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock, Weak};
use std::time::Instant;

use parking_lot::Mutex;
use socket2::Socket;

use crate::netns::{Netns, NetnsError};
use crate::socket::{self, Family};

/// Largest number of sockets of one family.
pub const MAX_STOCK: usize = 64;
/// Target size before the demand is known.
const INITIAL: usize = 2;
/// A pod whose refills follow one another within this time is busy, in milliseconds.
const CLOSE_MILLIS: u64 = 100;
/// Size of an idle stock.
const IDLE: usize = 1;

/// A pod's ready-made TCP sockets. Cloning shares the stock.
#[derive(Clone, Debug)]
pub struct SocketStock(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    inside: Netns,
    mark: Option<u32>,
    v4: FamilyStock,
    v6: FamilyStock,
}

/// The sockets of one family. The lock guards the list for the length of a push or pop.
#[derive(Debug)]
struct FamilyStock {
    family: Family,
    sockets: Mutex<Vec<OwnedFd>>,
    target: AtomicUsize,
    refilling: AtomicBool,
    taken: AtomicUsize,
    /// When a refill was last requested, in milliseconds since the first stock was used.
    asked: AtomicU64,
}

impl FamilyStock {
    fn new(family: Family) -> Self {
        Self {
            family,
            sockets: Mutex::new(Vec::new()),
            target: AtomicUsize::new(INITIAL),
            refilling: AtomicBool::new(false),
            taken: AtomicUsize::new(0),
            asked: AtomicU64::new(0),
        }
    }

    /// Refills that follow one another closely get larger: waking the helper costs more than a socket.
    fn note_refill(&self) {
        static START: LazyLock<Instant> = LazyLock::new(Instant::now);
        // 0 is the initial value, so the first refill counts as following none.
        let now = u64::try_from(START.elapsed().as_millis()).unwrap_or(u64::MAX).saturating_add(1);
        let before = self.asked.swap(now, Ordering::Relaxed);
        if before != 0 && now.saturating_sub(before) < CLOSE_MILLIS {
            let target = self.target.load(Ordering::Relaxed);
            self.target.store((target * 2).min(MAX_STOCK), Ordering::Relaxed);
        }
    }
}

/// All stocks, for the trimming of idle ones.
static STOCKS: Mutex<Vec<Weak<Shared>>> = Mutex::new(Vec::new());

impl SocketStock {
    /// A stock for `inside`; with a mark, sockets are transparent too (see [`socket::tcp`]). The
    /// first sockets are created when the first one is taken.
    pub fn new(inside: Netns, mark: Option<u32>) -> Self {
        let shared = Arc::new(Shared {
            inside,
            mark,
            v4: FamilyStock::new(Family::V4),
            v6: FamilyStock::new(Family::V6),
        });
        STOCKS.lock().push(Arc::downgrade(&shared));
        Self(shared)
    }

    /// The namespace that the sockets belong to.
    pub fn netns(&self) -> &Netns {
        &self.0.inside
    }

    /// The mark of the sockets.
    pub fn mark(&self) -> Option<u32> {
        self.0.mark
    }

    /// Takes an unbound, unconnected socket from the stock, or creates one if it is empty.
    pub async fn take(&self, family: Family) -> Result<Socket, NetnsError> {
        if let Some(socket) = self.try_take(family) {
            return Ok(socket);
        }
        let mark = self.0.mark;
        let id = self.0.inside.id();
        self.0.inside.run(move || socket::tcp(family, mark)).await?.map_err(|source| NetnsError::Socket {
            attempt: "make a TCP socket".into(),
            id,
            source,
        })
    }

    /// Takes a socket if there is one. Never waits.
    pub fn try_take(&self, family: Family) -> Option<Socket> {
        let stock = self.0.stock(family);
        stock.taken.fetch_add(1, Ordering::Relaxed);
        let (taken, left) = {
            let mut sockets = stock.sockets.lock();
            (sockets.pop(), sockets.len())
        };
        let target = stock.target.load(Ordering::Relaxed);
        if taken.is_none() {
            stock.target.store((target * 2).min(MAX_STOCK), Ordering::Relaxed);
        }
        if left <= target / 2 {
            stock.note_refill();
            self.refill(family);
        }
        taken.map(Socket::from)
    }

    /// Sockets in stock now, of both families.
    pub fn len(&self) -> usize {
        self.0.v4.sockets.lock().len() + self.0.v6.sockets.lock().len()
    }

    /// Whether the stock is empty.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Asks the helper thread to fill the stock to its target, unless it was asked already.
    fn refill(&self, family: Family) {
        if self.0.stock(family).refilling.swap(true, Ordering::AcqRel) {
            return;
        }
        let shared = Arc::clone(&self.0);
        let asked = self.0.inside.submit(move |entered| {
            let stock = shared.stock(family);
            match entered {
                Ok(()) => shared.fill(stock),
                Err(error) => tracing::warn!(%error, "socket stock not refilled"),
            }
            stock.refilling.store(false, Ordering::Release);
        });
        if asked.is_err() {
            self.0.stock(family).refilling.store(false, Ordering::Release);
        }
    }
}

impl Shared {
    fn stock(&self, family: Family) -> &FamilyStock {
        match family {
            Family::V4 => &self.v4,
            Family::V6 => &self.v6,
        }
    }

    /// Runs inside the namespace.
    fn fill(&self, stock: &FamilyStock) {
        let missing = stock.target.load(Ordering::Relaxed).saturating_sub(stock.sockets.lock().len());
        for _ in 0..missing {
            match socket::tcp(stock.family, self.mark) {
                Ok(socket) => stock.sockets.lock().push(socket.into()),
                Err(error) => {
                    tracing::warn!(netns = %self.inside.id(), %error, "socket stock not refilled");
                    return;
                }
            }
        }
    }
}

/// Closes sockets of stocks that were not used since the last call. Called by the helper
/// thread when it is idle.
pub(crate) fn trim_idle() {
    let mut stocks = STOCKS.lock();
    stocks.retain(|stock| stock.strong_count() > 0);
    for shared in stocks.iter().filter_map(Weak::upgrade) {
        for stock in [&shared.v4, &shared.v6] {
            if stock.taken.swap(0, Ordering::Relaxed) == 0 {
                stock.target.store(INITIAL, Ordering::Relaxed);
                let surplus = {
                    let mut sockets = stock.sockets.lock();
                    let keep = sockets.len().min(IDLE);
                    sockets.split_off(keep)
                };
                drop(surplus);
            }
        }
    }
}
