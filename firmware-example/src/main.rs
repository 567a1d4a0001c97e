//! The board brought up, and the application run. What happens goes to the log, in words that the tests wait for.

#![no_std]
#![no_main]

#[allow(unsafe_code, reason = "registers are met here, and nowhere else")]
mod board {
    // The file below `src/board/` that the target stands for, as `.cargo/config.toml` says.
    include!(concat!(env!("OUT_DIR"), "/board.rs"));
}
#[allow(unsafe_code, reason = "the heap and the linker's symbols are met here, and nowhere else")]
mod runtime;

use board::{Board, Clock, Ethernet, Led};
use firmware_example::net::{Net, Sockets};
use firmware_example::{Buffers, Happened, Sensor, public_key};
use ossicle_core::{IdentityPage, MAX_RSA_LEN, PageError, PublicKey};
use static_cell::{ConstStaticCell, StaticCell};

static TCP_RX: ConstStaticCell<[u8; 1024]> = ConstStaticCell::new([0; 1024]);
static TCP_TX: ConstStaticCell<[u8; 1024]> = ConstStaticCell::new([0; 1024]);
static SOCKETS: StaticCell<Sockets<'static>> = StaticCell::new();
static NET: StaticCell<Net<'static, Ethernet, Clock>> = StaticCell::new();
static BUFFERS: ConstStaticCell<Buffers> = ConstStaticCell::new(Buffers::new());
static MODULUS: ConstStaticCell<[u8; MAX_RSA_LEN]> = ConstStaticCell::new([0; MAX_RSA_LEN]);
static SENSOR: StaticCell<Sensor<'static, 'static>> = StaticCell::new();

/// The board as the application sees it.
struct Device {
    led: Led,
    /// Stands in for a sensor: counts up and down around 21 degrees.
    samples: u32,
}

impl firmware_example::Board for Device {
    fn entropy(&mut self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(32) {
            let fresh = runtime::simulation_only_entropy::<32>();
            for (to, from) in chunk.iter_mut().zip(fresh) {
                *to = from;
            }
        }
    }

    fn set_led(&mut self, on: bool) {
        self.led.set(on);
    }

    fn led(&self) -> bool {
        self.led.is_on()
    }

    fn temperature(&mut self) -> i32 {
        self.samples = self.samples.wrapping_add(1);
        let phase = i32::try_from(self.samples % 200).unwrap_or(0);
        2_100 + if phase < 100 { phase } else { 200 - phase }
    }

    fn instructions(&self) -> u64 {
        board::instructions()
    }

    fn observe(&mut self, happened: Happened) {
        match happened {
            Happened::Unreachable => defmt::warn!("server unreachable, trying again"),
            Happened::Connected { resumed, instructions } => {
                match resumed {
                    true => defmt::info!("resumed, instructions {=u64}", instructions),
                    false => defmt::info!("connected, instructions {=u64}", instructions),
                }
                measure();
            }
            Happened::Ready { instructions } => {
                defmt::info!("bundle published, instructions {=u64}", instructions);
                measure();
            }
            Happened::OwnerReady { instructions } => {
                defmt::info!("chain to the owner, instructions {=u64}", instructions);
                measure();
            }
            Happened::OwnerLost(reason) => defmt::warn!("owner lost: {}", reason),
            Happened::Reported { n, instructions } => {
                defmt::info!("reported {=u32}, instructions {=u64}", n, instructions);
            }
            Happened::Refused(reason) => defmt::warn!("reading refused: {}", reason),
            Happened::Obeyed { led } => defmt::info!("obeyed, led {=bool}", led),
            Happened::Ignored { signed } => defmt::warn!("ignored, signed {=bool}", signed),
            Happened::Joined { instructions } => {
                defmt::info!("joined a group, instructions {=u64}", instructions);
                measure();
            }
            Happened::GroupReady { instructions } => {
                defmt::info!("chain to the group, instructions {=u64}", instructions);
                measure();
            }
            Happened::Answered { n } => defmt::info!("answered {=u32}", n),
            Happened::Left => defmt::info!("left the group"),
            Happened::GroupLost(reason) => defmt::warn!("group lost: {}", reason),
            Happened::Ended(ending) => defmt::warn!("connection ended: {}", ending),
            _ => {}
        }
    }
}

fn measure() {
    defmt::info!("stack {=usize}, heap {}", runtime::stack_high_water(), runtime::heap_high_water());
}

/// The identity page, or the end: a device without one is nobody.
#[inline(never)]
fn page() -> (IdentityPage<'static>, PublicKey<'static>) {
    let page = match IdentityPage::decode(runtime::identity_page()) {
        Ok(page) => page,
        Err(error) => {
            // Words of its own: formatting the sentence of the library would cost more flash than the driver.
            match error {
                PageError::Missing => defmt::error!("no identity page: make one with `ossicle enroll` and load it"),
                PageError::Version => defmt::error!("identity page of another version: make a new one"),
                _ => defmt::error!("broken identity page: load it again, or make a new one with `ossicle enroll`"),
            }
            runtime::exit(1);
        }
    };
    defmt::info!("{=str} reports to {=str}", page.name, page.owner.name);
    match public_key(&page, MODULUS.take()) {
        Ok(key) => (page, key),
        Err(error) => {
            defmt::error!("the identity page holds no key: {}", error);
            runtime::exit(1);
        }
    }
}

/// Makes the application in the place where it stays. In a frame of its own, which is gone when the application runs.
#[inline(never)]
fn sensor(
    page: IdentityPage<'static>,
    key: PublicKey<'static>,
    device: &mut Device,
) -> &'static mut Sensor<'static, 'static> {
    match Sensor::new(page, key, BUFFERS.take(), device) {
        Ok(sensor) => SENSOR.init(sensor),
        Err(error) => {
            defmt::error!("the sensor cannot be made: {}", error);
            runtime::exit(1);
        }
    }
}

#[inline(never)]
fn net(ethernet: Ethernet, clock: Clock) -> &'static mut Net<'static, Ethernet, Clock> {
    let seed = u64::from_le_bytes(runtime::simulation_only_entropy());
    let mac = ethernet.mac();
    NET.init_with(|| {
        Net::new(ethernet, clock, mac, seed, TCP_RX.take(), TCP_TX.take(), SOCKETS.init_with(Sockets::new))
    })
}

#[cortex_m_rt::entry]
fn main() -> ! {
    let Some(Board { clock, ethernet, led }) = Board::take() else {
        defmt::panic!("the board was taken twice");
    };
    let mut device = Device { led, samples: 0 };
    let (page, key) = page();
    sensor(page, key, &mut device).run(net(ethernet, clock), &mut device);
    runtime::exit(1);
}
