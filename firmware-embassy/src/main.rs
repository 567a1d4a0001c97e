//! The sketch at work, in QEMU: embassy's executor, clock and network over the second board of `firmware-example`.
//!
//! The board's own file is taken as it is: what it offers to smoltcp, a few lines here pass on to embassy. On a chip with a
//! hardware abstraction of embassy's, all of this but the last two tasks is there already.
#![no_std]
#![no_main]

#[allow(unsafe_code, dead_code, reason = "shared with firmware-example, where it is used in full")]
#[path = "../../firmware-example/src/board/mps2_an386.rs"]
mod board;
#[allow(unsafe_code, dead_code, reason = "as above")]
#[path = "../../firmware-example/src/runtime.rs"]
mod runtime;

use core::cell::RefCell;
use core::sync::atomic::{AtomicBool, Ordering};
use core::task::{Context, Waker};

use board::{Board, Ethernet, Led};
use chacha20::ChaCha20Rng;
use critical_section::Mutex;
use embassy_executor::raw::Executor;
use embassy_net::{Runner, Stack, StackResources};
use embassy_net_driver::{Capabilities, Driver, HardwareAddress, LinkState};
use embassy_time_queue_utils::Queue;
use firmware_embassy::{InSoftware, Thing};
use firmware_example::net::Clock as _;
use firmware_example::public_key;
use ossicle_core::{IdentityPage, MAX_RSA_LEN, generator_seed};
use rand_core::SeedableRng;
use smoltcp::phy::Device as _;
use smoltcp::time::Instant;
use static_cell::{ConstStaticCell, StaticCell};

// --- what a hardware abstraction would bring -----------------------------------------------------------------

/// Time, in milliseconds. Nothing interrupts: the main loop looks who is due.
struct Time {
    due: Mutex<RefCell<Queue>>,
}

impl embassy_time_driver::Driver for Time {
    fn now(&self) -> u64 {
        board::now_ms()
    }

    fn schedule_wake(&self, at: u64, waker: &Waker) {
        critical_section::with(|cs| self.due.borrow_ref_mut(cs).schedule_wake(at, waker));
    }
}

embassy_time_driver::time_driver_impl!(static TIME: Time = Time { due: Mutex::new(RefCell::new(Queue::new())) });

/// Whether a task has something to do.
static WOKEN: AtomicBool = AtomicBool::new(false);

#[allow(unsafe_code, reason = "the name that the executor calls")]
#[unsafe(export_name = "__pender")]
fn pend(_: *mut ()) {
    WOKEN.store(true, Ordering::Relaxed);
}

/// Who waits for a frame, or for room for one.
static NETWORK: Mutex<RefCell<Option<Waker>>> = Mutex::new(RefCell::new(None));

/// The board's Ethernet controller, as an embassy driver.
struct Port(Ethernet);

impl Port {
    fn wait(context: &Context<'_>) {
        critical_section::with(|cs| NETWORK.replace(cs, Some(context.waker().clone())));
    }
}

struct Received(<Ethernet as smoltcp::phy::Device>::RxToken<'static>);
struct Room(<Ethernet as smoltcp::phy::Device>::TxToken<'static>);

impl embassy_net_driver::RxToken for Received {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, f: F) -> R {
        // Embassy wants a frame that it may change, and the board's driver lends one to read.
        smoltcp::phy::RxToken::consume(self.0, |frame| {
            let mut copy = [0; 1_514];
            match copy.get_mut(..frame.len()) {
                Some(copy) => {
                    copy.copy_from_slice(frame);
                    f(copy)
                }
                None => f(&mut []),
            }
        })
    }
}

impl embassy_net_driver::TxToken for Room {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        smoltcp::phy::TxToken::consume(self.0, len, f)
    }
}

impl Driver for Port {
    type RxToken<'a> = Received;
    type TxToken<'a> = Room;

    fn receive(&mut self, context: &mut Context<'_>) -> Option<(Received, Room)> {
        Self::wait(context);
        self.0.receive(Instant::ZERO).map(|(frame, room)| (Received(frame), Room(room)))
    }

    fn transmit(&mut self, context: &mut Context<'_>) -> Option<Room> {
        Self::wait(context);
        self.0.transmit(Instant::ZERO).map(Room)
    }

    fn link_state(&mut self, _: &mut Context<'_>) -> LinkState {
        LinkState::Up
    }

    fn capabilities(&self) -> Capabilities {
        let mut capabilities = Capabilities::default();
        capabilities.max_transmission_unit = self.0.capabilities().max_transmission_unit;
        capabilities
    }

    fn hardware_address(&self) -> HardwareAddress {
        HardwareAddress::Ethernet(self.0.mac())
    }
}

// --- the tasks -----------------------------------------------------------------------------------------------

/// The LED, and something that counts up and down around 21 degrees for a sensor.
struct Sensor {
    led: Led,
    samples: u8,
}

impl Thing for Sensor {
    fn seed(&mut self) -> [u8; 64] {
        runtime::simulation_only_entropy()
    }

    fn reading(&mut self) -> [u8; 12] {
        self.samples = (self.samples + 1) % 200;
        let phase = if self.samples < 100 { self.samples } else { 199 - self.samples };
        let mut reading = *b"21.00C led=0";
        let [_, _, _, tenths, hundredths, .., led] = &mut reading;
        *tenths += phase / 10;
        *hundredths += phase % 10;
        *led += u8::from(self.led.is_on());
        reading
    }

    fn obey(&mut self, command: &[u8]) {
        match command {
            b"led on" => self.led.set(true),
            b"led off" => self.led.set(false),
            _ => defmt::warn!("ignored"),
        }
    }
}

#[embassy_executor::task]
async fn network(mut runner: Runner<'static, Port>) -> ! {
    runner.run().await
}

#[embassy_executor::task]
async fn sensor(stack: Stack<'static>, page: IdentityPage<'static>, led: Led) {
    static MODULUS: ConstStaticCell<[u8; MAX_RSA_LEN]> = ConstStaticCell::new([0; MAX_RSA_LEN]);
    let result = match public_key(&page, MODULUS.take()) {
        Ok(key) => {
            // The device's own secret makes the seed unpredictable to whoever can predict the entropy (PROTOCOL 8.4).
            let fresh = || {
                let entropy: [u8; 64] = runtime::simulation_only_entropy();
                ChaCha20Rng::from_seed(*generator_seed(&entropy, page.key.d).expose())
            };
            let (mut rng, mut element) = (fresh(), InSoftware::new(page, fresh()));
            firmware_embassy::run(stack, page, key, &mut Sensor { led, samples: 0 }, &mut element, &mut rng).await
        }
        Err(error) => Err(error),
    };
    let Err(error) = result;
    defmt::error!("the sensor cannot be made: {}", error);
    runtime::exit(1);
}

#[cortex_m_rt::entry]
fn main() -> ! {
    static RESOURCES: StaticCell<StackResources<2>> = StaticCell::new();
    static EXECUTOR: StaticCell<Executor> = StaticCell::new();

    let Some(Board { clock, ethernet, led }) = Board::take() else {
        defmt::panic!("the board was taken twice");
    };
    let Ok(page) = IdentityPage::decode(runtime::identity_page()) else {
        defmt::error!("no identity page, or a broken one: make one with `ossicle enroll` and load it");
        runtime::exit(1);
    };
    defmt::info!("{=str} reports to {=str}", page.name, page.owner.name);

    let seed = u64::from_le_bytes(runtime::simulation_only_entropy());
    let resources = RESOURCES.init_with(StackResources::new);
    let config = embassy_net::Config::dhcpv4(Default::default());
    let (stack, runner) = embassy_net::new(Port(ethernet), config, resources, seed);
    let executor: &'static Executor = EXECUTOR.init(Executor::new(core::ptr::null_mut()));
    let spawner = executor.spawner();
    match (network(runner), sensor(stack, page, led)) {
        (Ok(network), Ok(sensor)) => {
            spawner.spawn(network);
            spawner.spawn(sensor);
        }
        _ => defmt::panic!("a task is there twice"),
    }
    loop {
        WOKEN.store(false, Ordering::Relaxed);
        #[allow(unsafe_code, reason = "the executor's own loop")]
        // SAFETY: initialised above, and this is the only place that polls it; no interrupt handler runs.
        unsafe {
            executor.poll();
        }
        // Whose time has come is woken here; whoever still sleeps does so until the next moment or frame.
        let next = critical_section::with(|cs| TIME.due.borrow_ref_mut(cs).next_expiration(board::now_ms()));
        if !WOKEN.load(Ordering::Relaxed) {
            clock.rest(next);
        }
        if let Some(waker) = critical_section::with(|cs| NETWORK.take(cs)) {
            waker.wake();
        }
    }
}
